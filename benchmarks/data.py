"""How fast data is prepared, beside what people use, in CPU-seconds; and how much memory 1 GB of input takes. One run for all ratios.

chat     chats in JSON lines → ids, masks and packs; peer: `datasets.map(apply_chat_template, return_assistant_tokens_mask)` + TRL's bfd
plain    texts in JSON lines → ids; peer: `encode_batch_fast` of the tokenizers library
memory   stage prepare on 1 GB of chats with SmolLM2: the most that all its processes hold together (run `make demo` or `xtuner prepare`
         with it first: the base model comes from its store)

The peers run in an environment of their own (constraints-peers.txt). A round runs both sides one after the other; imports are not
counted, on either side. Loading our tokenizers is given apart as `start`: it does not grow with the input. The peer gets the first rows
only, since it takes the same time for each row; over these, ids and masks must be equal. Packing and loader: benchmarks/packing.py.

python benchmarks/data.py MODEL_DIR [--rows chat,plain,memory] [--quick]     writes benchmarks/results/data.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from data_input import write_chats, write_texts

from xtuner_core.data.workers import ENVIRONMENT

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
RESULTS = HERE / "results" / "data.json"
PEERS = PROJECT / ".environments" / "data-peers"
CONSTRAINTS = HERE / "constraints-peers.txt"
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
RECIPE, STORE = "smollm2_135m_instruct_lora_tickets_e3", PROJECT / "artifacts"
MB = 10**6


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, help="a Hugging Face folder with a ChatML tokenizer")
    parser.add_argument("--rows", default="chat,plain,memory")
    parser.add_argument("--quick", action="store_true", help="a tenth of the input, one round")
    arguments = parser.parse_args()
    share, rounds = (0.1, 1) if arguments.quick else (1.0, 5)
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(dir=PROJECT / ".environments") as scratch:
        for row in arguments.rows.split(","):
            folder = Path(scratch) / row
            folder.mkdir()
            result[row] = {**ROWS[row](arguments.model_dir.resolve(), folder, share, rounds), **machine()}
            shutil.rmtree(folder)
            print(row, json.dumps(result[row], indent=2), flush=True)
    if not arguments.quick:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def chat(model_dir: Path, folder: Path, share: float, rounds: int) -> dict[str, object]:
    """Samples per CPU-second."""
    write_chats(folder / "all.jsonl", int(100_000 * share), seed=0)
    head(folder / "all.jsonl", folder / "first.jsonl", int(10_000 * share))
    return compare("chat", model_dir, folder, rounds)


def plain(model_dir: Path, folder: Path, share: float, rounds: int) -> dict[str, object]:
    """Lines per CPU-second; the peer encodes the first sixth."""
    write_texts(folder / "all.jsonl", int(100 * MB * share), seed=0)
    lines = (folder / "all.jsonl").read_bytes().count(b"\n")
    head(folder / "all.jsonl", folder / "first.jsonl", lines // 6)
    return compare("plain", model_dir, folder, rounds)


def compare(action: str, model_dir: Path, folder: Path, rounds: int) -> dict[str, object]:
    """Both sides in turn; rates, their ratio with and without our start, and whether the tokens are equal."""
    running, whole, start, peer, equal = [], [], [], [], {}
    for number in range(rounds):
        ours = run(sys.executable, ENVIRONMENT, "data_ours.py", action, folder / "all.jsonl", model_dir, folder / f"ours{number}")
        theirs = run(peers_python(), {}, "data_peers.py", action, folder / "first.jsonl", model_dir, folder / "theirs.npz")
        equal = require_equal(
            folder / f"ours{number}" / "documents" / "00000", folder / "theirs.npz", folder / "first.jsonl", model_dir, action == "chat"
        )
        shutil.rmtree(folder / f"ours{number}")
        running.append(ours["rows"] / ours["cpu"])
        whole.append(ours["rows"] / (ours["cpu"] + ours["start"]))
        start.append(ours["start"])
        peer.append(theirs["rows"] / theirs["cpu"])
    rows = ours["rows"]
    size = (folder / "all.jsonl").stat().st_size
    return {
        "tokenizer": model_dir.name,
        "input": f"{rows} rows, {size / MB:.0f} MB; peer: the first {theirs['rows']}",
        **equal,
        "rows_per_cpu_second": {"ours": median(running), "ours_with_start": median(whole), "peer": median(peer)},
        "mb_per_cpu_second": {
            "ours": median([rate * size / rows / MB for rate in running]),
            "peer": median([rate * size / rows / MB for rate in peer]),
        },
        "start_cpu_seconds": median(start),
        "ratio": median([a / b for a, b in zip(running, peer, strict=True)]),
        "ratio_with_start": median([a / b for a, b in zip(whole, peer, strict=True)]),
        "rounds": rounds,
    }


def require_equal(ours: Path, theirs: Path, source: Path, model_dir: Path, chats: bool) -> dict[str, int]:
    """Ids, document lengths and masks of the first rows are the peer's.

    Not compared are rows in which the name of a control token stands: there the peer makes one of it, ours is text. The end of a plain
    text is ours alone.
    """
    from xtuner_core.data.dataset import Documents

    names = [entry["content"] for entry in json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]]
    peer = np.load(theirs)
    ids, loss, ends = peer["ids"], peer["loss"], np.cumsum(peer["lengths"]).tolist()
    documents, tokens, forged = Documents(ours), 0, 0
    with open(source, encoding="utf-8") as lines:
        for number, (line, length, end) in enumerate(zip(lines, peer["lengths"].tolist(), ends, strict=True)):
            if any(name in line for name in names):
                forged += 1
                continue
            piece = documents.piece(number, number, 0, int(np.diff(documents.offsets[number : number + 2])[0]))
            mask = np.zeros(len(piece.ids), bool)
            for first, last in piece.spans:
                mask[first:last] = True
            assert np.array_equal(piece.ids[: None if chats else -1], ids[end - length : end]), f"{source}:{number + 1}: other ids"
            assert not chats or np.array_equal(mask, loss[end - length : end]), f"{source}:{number + 1}: another mask"
            tokens += length
    return {"equal_tokens": tokens, "rows_in_which_the_peer_forges_a_control_token": forged}


def memory(model_dir: Path, folder: Path, share: float, rounds: int) -> dict[str, object]:
    """Stage prepare as a user runs it, with two workers, on chats."""
    write_chats(folder / "input.jsonl", int(1_000_000 * share), seed=0)
    shutil.copytree(STORE / "base", folder / "store" / "base", copy_function=os.link)  # the base model, without fetching it again
    command = [sys.executable, "-m", "pipelines.cli", "prepare", RECIPE, "--store", str(folder / "store")]
    command += ["--set", f'data.train=["{folder / "input.jsonl"}"]', "--set", "data.workers=2", "--set", "data.validation=0.02"]
    command += ["--set", "data.max_length=4096", "--set", "data.pack_length=4096"]
    started = time.monotonic()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=ALONE, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT)
    private, resident = watch(process)
    if process.returncode:
        raise SystemExit((folder / "log").read_text(encoding="utf-8"))
    return {
        "input": f"{(folder / 'input.jsonl').stat().st_size / MB:.0f} MB of chats, 2 workers",
        "peak_private_mb": round(private / MB),
        "peak_resident_mb": round(resident / MB),
        "seconds": round(time.monotonic() - started, 1),
    }


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """The most bytes the process and its children held at once: of their own, and with what they share (libraries, mapped files)."""
    private = resident = 0
    while process.poll() is None:
        now = [0, 0]
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                facts = one.memory_full_info()
            except psutil.Error:
                continue
            now = [now[0] + facts.uss, now[1] + facts.rss]
        private, resident = max(private, now[0]), max(resident, now[1])
        time.sleep(0.2)
    return private, resident


def peers_python() -> Path:
    """The peers' interpreter, installed if its constraints changed."""
    python, stamp = PEERS / "bin" / "python", PEERS / CONSTRAINTS.name
    if not stamp.is_file() or stamp.read_bytes() != CONSTRAINTS.read_bytes():
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
        for packages in (["torch"], ["trl", "datasets", "transformers"]):  # torch first, from where this machine has it
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *packages], check=True)
        shutil.copyfile(CONSTRAINTS, stamp)
    return python


def run(python: str | Path, environment: dict[str, str], script: str, *arguments: str | Path) -> dict[str, float]:
    """The last line that one of the two sides prints."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env={**ALONE, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def head(source: Path, target: Path, rows: int) -> None:
    """Copy the first lines."""
    with open(source, "rb") as lines, open(target, "wb") as stream:
        stream.writelines(line for line, _ in zip(lines, range(rows), strict=False))


def median(values: list[float]) -> float:
    """To four digits."""
    return float(f"{statistics.median(values):.4g}")


def machine() -> dict[str, str]:
    """Where, with what and when."""
    ours = {name: version(name) for name in ("tokenizers", "fastokens", "numpy")}
    peers = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").split())
    versions = ", ".join(
        f"{name} {number}" for name, number in {**ours, **{name: peers[name] for name in ("trl", "datasets", "transformers")}}.items()
    )
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions, "date": date.today().isoformat()}


ROWS = {"chat": chat, "plain": plain, "memory": memory}

if __name__ == "__main__":
    main()
