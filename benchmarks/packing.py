"""How fast documents are packed, beside TRL, and how fast packs are read back; all in one run, in CPU-seconds of one core.

Document lengths are lognormal with a mean of about 545 tokens. TRL's `pack_dataset` (strategy bfd) runs in an environment of its own, on
the whole set at once, where it finds the same number of packs, and as it is by default, a thousand documents at a time. It also moves
the tokens, which are one byte each here to make that cheap; ours writes an index. The loader reads memory-mapped packs in random
order into the tensors of a batch, from the page cache.

python benchmarks/packing.py [--without-trl]     writes benchmarks/results/packing.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "packing.json"
PEER = Path(__file__).parents[1] / ".environments" / "packing-benchmark"
PEER_PACKAGES = ("datasets==5.2.0", "transformers==5.23.0", "psutil", "jinja2")
TRL = "trl==1.16.0"
SIZES = ((200_000, 4096), (1_000_000, 8192))
REPEATS = 5

TRL_PROGRAM = """
import json, sys, time
import datasets, numpy as np, pyarrow as pa
from trl.data_utils import pack_dataset

lengths, capacity = np.load(sys.argv[1]), int(sys.argv[2])
offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int8)))
found = {}
for name, documents in (("whole_set", len(lengths)), ("by_1000", 1000)):
    dataset = datasets.Dataset(pa.table({"input_ids": column}))
    started = time.process_time()
    packed = pack_dataset(dataset, capacity, strategy="bfd", map_kwargs={"batch_size": documents})
    found[name] = {"cpu_seconds": time.process_time() - started, "packs": len(packed)}
print(json.dumps(found))
"""


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-trl", action="store_true", help="do not install and run the peer")
    peer = None if parser.parse_args().without_trl else peer_python()
    result = {
        "what": "medians; lognormal(5.9, 0.9) document lengths",
        "packing": [measure_packing(documents, capacity, peer) for documents, capacity in SIZES],
        "loader": [measure_loader(documents, capacity) for documents, capacity in ((100_000, 4096), (100_000, 8192))],
        "peer": TRL if peer else None,
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "date": date.today().isoformat(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def peer_python() -> Path:
    """TRL's packing needs no torch, so TRL is installed without what it depends on."""
    python = PEER / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        for options in (PEER_PACKAGES, ("--no-deps", TRL)):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--quiet", *options], check=True)
    return python


def lognormal(documents: int, capacity: int) -> np.ndarray:
    """Lengths in tokens, mean about 545."""
    return np.clip(np.random.default_rng(0).lognormal(5.9, 0.9, documents), 16, capacity).astype(np.int64)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median CPU time."""
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return statistics.median(spent)


def measure_packing(documents: int, capacity: int, peer: Path | None) -> dict[str, object]:
    """Every way of packing, and TRL."""
    from xtuner_core import registry
    from xtuner_core.data import packing
    from xtuner_core.data.pack import efficiency

    lengths = lognormal(documents, capacity)
    ours = {}
    for name in registry.names(packing):
        pack = registry.find(packing, name).pack
        spent = seconds(lambda pack=pack: pack(lengths, capacity, 0), REPEATS)
        packs = pack(lengths, capacity, 0)
        ours[name] = figures(documents, spent) | {"packs": len(packs), "efficiency": round(efficiency(packs, capacity), 6)}
    theirs = measure_trl(peer, lengths, capacity) if peer else {}
    ratios = {name: round(told["cpu_seconds"] / ours["best_fit"]["cpu_seconds"], 1) for name, told in theirs.items()}
    return {"documents": documents, "pack_length": capacity, "ours": ours, "trl_bfd": theirs, "best_fit_times_faster_than_trl": ratios}


def measure_trl(python: Path, lengths: np.ndarray, capacity: int) -> dict[str, dict]:
    """TRL's bfd on the same lengths."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lengths.npy")
        np.save(file, lengths)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        command = [str(python), "-c", TRL_PROGRAM, str(file), str(capacity)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    slots = {name: told["packs"] * capacity for name, told in found.items()}
    full = {name: {"packs": found[name]["packs"], "efficiency": round(int(lengths.sum()) / slots[name], 6)} for name in found}
    return {name: figures(len(lengths), found[name]["cpu_seconds"]) | full[name] for name in found}


def figures(documents: int, spent: float) -> dict[str, float]:
    """Time, and what it means."""
    return {"cpu_seconds": round(spent, 4), "documents_per_second": round(documents / spent)}


def measure_loader(documents: int, capacity: int) -> dict[str, object]:
    """One epoch over packs of two-turn conversations that begin alike."""
    from xtuner_core.data.dataset import PackedDataset, write_documents, write_packs
    from xtuner_core.data.loader import make_batch
    from xtuner_core.data.packing import best_fit

    lengths = lognormal(documents, capacity)
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder, "documents", "00000"), [conversations(lengths)])
        write_packs(Path(folder, "packs"), best_fit.pack(lengths, capacity, 0))
        dataset = PackedDataset(Path(folder))
        order = np.random.default_rng(1).permutation(len(dataset)).tolist()
        spent = seconds(lambda: [make_batch(dataset, pack).text_tokens for pack in order], REPEATS)
    rates = {"tokens_per_second": round(int(lengths.sum()) / spent), "microseconds_per_pack": round(spent / len(order) * 1e6, 1)}
    return {"documents": documents, "pack_length": capacity, "packs": len(order), **rates}


def conversations(lengths: np.ndarray):
    """Random tokens; three begin every document, and two answers in it carry loss."""
    from xtuner_core.data.tokenize import Tokenized

    starts = np.cumsum(lengths) - lengths
    ids = np.random.default_rng(0).integers(0, 150_000, int(lengths.sum()), dtype=np.uint32)
    for place in range(3):
        ids[starts + place] = place
    edges = np.zeros(len(ids) + 1, np.int8)
    for first, end in ((0.3, 0.5), (0.7, 1.0)):
        edges[starts + (lengths * first).astype(int)] += 1
        edges[starts + (lengths * end).astype(int)] -= 1
    return Tokenized(ids, np.cumsum(edges[:-1], dtype=np.int8) > 0, lengths)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
