"""How fast the engine trains on the CPU, beside what people use; every side in a process of its own, in turn, round after round.

full     all weights of SmolLM2-135M: ours, transformers Trainer (fp32 padded; bf16=True padded; the same in batches of 8 documents with
         gradient accumulation), TRL's SFTTrainer (default; packing=True)
lora     rank 16, all linear layers: ours, transformers Trainer with peft (fp32 padded; bf16=True padded)

All train on the repository's chats: the same documents in each step, in the same order, with the same learning rate and AdamW (TRL's
packing makes steps of its own). A step has 48 documents, about what fits a pack of the default length, 2048 tokens; a padded side takes
them as one batch. Tokens are counted without padding, imports and loading are not timed, the first step warms up, and memory is the
process's largest resident set. One thread a process: a second one adds CPU-seconds rather than speed where cores are not one's own.
A run of ours in fp32 must have the loss of the fp32 Trainer within 0.5 % in every step.
TRL runs in the environment of constraints-peers.txt, the Trainer in ours: both have the same torch and transformers.

python benchmarks/train_cpu.py [--store artifacts] [--quick]     writes benchmarks/results/train_cpu.json; about 20 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from training_job import IGNORE, Documents, Job, Json, ask, environment, write_packs

from data import PROJECT, peers_python

RESULTS = Path(__file__).resolve().parent / "results" / "train_cpu.json"
RECIPE, QUICK_RECIPE = "smollm2_135m_instruct_lora_tickets_e3", "qwen3_tiny_full_openai"
DATA = "data.train=[data/tickets/train.jsonl, data/openai_chats/train.jsonl]"
LONGEST = 600
"""Seconds of one side."""
SECONDS = 15
"""A slow side is measured for so long, but for two steps at least; so both rounds fit into the limit."""
TOLERANCE = 0.005
CHECK = "ours fp32"
FULL = {
    "ours": ("ours", "bf16"),
    "Trainer fp32": ("padded", "fp32"),
    "Trainer bf16": ("padded", "bf16"),
    "Trainer bf16 8": ("padded_by_8", "bf16"),
    "TRL": ("trl", "bf16"),
    "TRL packing": ("trl_packing", "bf16"),
}
SIDES = {"full": FULL, "lora": {name: FULL[name] for name in ("ours", "Trainer fp32", "Trainer bf16")}}
RATES = {"full": 2e-5, "lora": 2e-4}


def main() -> None:
    """Measure every side and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=PROJECT / "artifacts", help="where the base model and the data are, or are made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--documents", type=int, default=48, help="documents in a step")
    parser.add_argument("--limit", type=float, default=1500, help="seconds; no round is begun that would end later")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, two steps; writes nothing")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = prepare(arguments.store, arguments.quick, arguments.documents, Path(scratch))
        ready = time.monotonic()
        rounds = [run_round(jobs, arguments.threads, Path(scratch))]
        length = time.monotonic() - ready
        checks = check_losses(jobs, rounds[0], arguments.threads, Path(scratch))
        while not arguments.quick and time.monotonic() - began + length < arguments.limit:
            rounds.append(run_round(jobs, arguments.threads, Path(scratch)))
    result = {
        **{method: {"sides": table(method, rounds), **checks[method]} for method in SIDES},
        "rounds": len(rounds),
        "seconds": round(time.monotonic() - began),
        **machine(arguments.threads),
    }
    show(result)
    if not arguments.quick:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not all(checks[method]["loss_within_half_percent"] for method in SIDES):
        raise SystemExit("the losses differ by more than 0.5 %")


def prepare(store: Path, quick: bool, documents: int, scratch: Path) -> dict[str, Job]:
    """A job for each method; base model and tokens come from the stages."""
    from pipelines.artifacts import Store
    from pipelines.recipe import load_recipe
    from pipelines.runner import run_until

    recipe = load_recipe(QUICK_RECIPE if quick else RECIPE, [DATA])
    base, data = (run_until(name, recipe, Store(store), lambda line: None).artifact.payload for name in ("base", "prepare"))
    steps, documents = (3, 4) if quick else (7, documents)
    chosen = choose(data, steps, documents)
    write_packs(chosen, max(chosen.tokens(pack) for pack in chosen.packs()), scratch)
    job = Job(str(base / "model"), False, str(scratch), "full", "bf16", "fp32", 0.0, warmup=1, steps=steps - 1, seconds=SECONDS)
    return {method: replace(job, method=method, lr=RATES[method]) for method in SIDES}


def choose(data: Path, steps: int, documents: int) -> Documents:
    """So many documents a step, at random."""
    from xtuner_core.data.dataset import PackedDataset

    dataset = PackedDataset(data)
    count = sum(len(shard) for shard in dataset.shards)
    numbers = np.random.default_rng(0).permutation(count)[: steps * documents].tolist()
    found = [dataset.document(number) for number in numbers]
    ids = [one.ids.astype(np.int64) for one in found]
    labels = [np.where(one.loss, values, IGNORE) for one, values in zip(found, ids, strict=True)]
    return Documents(ids, labels, [documents] * steps)


def run_round(jobs: dict[str, Job], threads: int, scratch: Path) -> Json:
    """Every side of every method once."""
    found: Json = {}
    for method, job in jobs.items():
        for name, (side, dtype) in SIDES[method].items():
            found[method, name] = run_side(side, replace(job, dtype=dtype), threads, scratch)
            print(method, name, {key: value for key, value in found[method, name].items() if key != "losses"}, flush=True)
    return found


def run_side(side: str, job: Job, threads: int, scratch: Path) -> Json:
    """One process; ours gets the environment that the launcher gives it.

    Raises:
        SystemExit: it has no result.
    """
    from pipelines.launchers._torchrun import environment_here

    file, around = job.write(scratch / "job.json"), environment(threads)
    if side == "ours":
        found = ask(sys.executable, {**environment_here(1), **around}, LONGEST, "train_ours.py", file)
    else:
        found = ask(peers_python() if side.startswith("trl") else sys.executable, around, LONGEST, "train_peers.py", side, file)
    if "failed" in found:
        raise SystemExit(f"{side}: {found['failed']}")
    return found


def check_losses(jobs: dict[str, Job], first: Json, threads: int, scratch: Path) -> dict[str, Json]:
    """Ours in fp32 beside the fp32 Trainer, and how far ours as shipped (bf16) is from it: largest relative difference of a step."""
    checks = {}
    for method, job in jobs.items():
        reference = first[method, "Trainer fp32"]["losses"]
        ours = run_side("ours", replace(job, dtype="fp32"), threads, scratch)["losses"]
        differences = {CHECK: difference(ours, reference), "ours": difference(first[method, "ours"]["losses"], reference)}
        checks[method] = {"loss_difference": differences, "loss_within_half_percent": differences[CHECK] <= TOLERANCE}
    return checks


def difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of a step that both made."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=False))


def table(method: str, rounds: list[Json]) -> dict[str, Json]:
    """Medians over the rounds of each side, and of the ratios of a round."""
    rows = {}
    for name in SIDES[method]:
        runs, ours = [found[method, name] for found in rounds], [found[method, "ours"] for found in rounds]
        row = {key: median([run[key] for run in runs]) for key in ("tokens_per_cpu_second", "tokens_per_second", "peak_memory")}
        ratios = {
            "ours_is_faster": median([a["tokens_per_cpu_second"] / b["tokens_per_cpu_second"] for a, b in zip(ours, runs, strict=True)]),
            "ours_has_of_its_memory": median([a["peak_memory"] / b["peak_memory"] for a, b in zip(ours, runs, strict=True)]),
        }
        rows[name] = {**row, **({} if name == "ours" else ratios), "losses": runs[0]["losses"]}
    return rows


def show(result: Json) -> None:
    """The table for people."""
    print(f"\n{'':5} {'':14} {'tok/CPU-s':>10} {'tok/s':>8} {'memory GB':>10} {'ours ×':>7} {'memory ×':>9}   loss, first and last")
    for method in SIDES:
        common = min(len(row["losses"]) for row in result[method]["sides"].values())
        for name, row in result[method]["sides"].items():
            ratio, memory = row.get("ours_is_faster", 1), row.get("ours_has_of_its_memory", 1)
            speed = f"{row['tokens_per_cpu_second']:10.1f} {row['tokens_per_second']:8.1f} {row['peak_memory'] / 1e9:10.2f}"
            losses = f"{row['losses'][0]:.4f} → {row['losses'][common - 1]:.4f}"
            print(f"{method:5} {name:14} {speed} {ratio:7.2f} {memory:9.2f}   {losses}")
        print(f"{method:5} largest difference to the loss of Trainer fp32: {result[method]['loss_difference']}")


def median(values: list[float]) -> float:
    """To four digits."""
    return float(f"{statistics.median(values):.4g}")


def machine(threads: int) -> dict[str, str]:
    """Where, with what and when."""
    from importlib.metadata import version

    import torch

    names = ("torch", "transformers", "accelerate", "peft")
    trl = (Path(__file__).resolve().parent / "constraints-peers.txt").read_text(encoding="utf-8").split("trl==")[1].split()[0]
    versions = ", ".join([*(f"{name} {version(name)}" for name in names), f"trl {trl}"])
    what = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {threads} thread a process"
    return {"machine": what, "versions": versions, "date": date.today().isoformat()}


if __name__ == "__main__":
    main()
