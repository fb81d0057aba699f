"""How fast the engine trains on one GPU, beside transformers Trainer; one process a run, in the order ours, peers, ours.

First what the device can do at most (a bf16 product of 8192 × 8192 matrices, a copy of 4 GiB). Then, for Qwen3-8B, -1.7B and -0.6B
with random weights, full and LoRA (rank 16, all linear layers): tokens per second, MFU, peak memory. Both sides see the same packs of
4096 tokens of documents with lognormal lengths (mean about 545), every token is learned, and no padding is counted.

padded       transformers Trainer: a pack's documents as a batch, padded to the longest
liger        transformers Trainer with liger's kernels: a pack as one row with restarting positions
flattened    the same without liger, where liger is not installed

MFU: 6 FLOPs a token and matrix parameter (the head counts, the embedding does not; 4 for LoRA, which needs no gradient of frozen
weights) plus 6 · layers · heads · head width · Σlen²/Σlen, over the device's dense bf16 peak (xtuner_core/models/flops.py);
recomputation is never credited. Ours compiles its layers.

A run that fails, for memory or for anything else, is a line of the table and does not end the others; one for which no time is left
is left out. No other environment is needed: the peers run in the interpreter that runs this, so torch ≥ 2.11 and transformers ≥ 5.17 do.

python benchmarks/train_gpu.py [--budget 480] [--output FILE]     writes benchmarks/results/train_gpu.json after each row
python benchmarks/train_gpu.py --dry-run                          the same path on a CPU with a tiny model; writes only to --output
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from training_job import Documents, Job, Json, ask, environment, write_packs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "train_gpu.json"
PRESETS = HERE.parent / "xtuner_core" / "models" / "presets"
LARGE = 100e9
"""Bytes of memory from which a GPU takes 8B in full without recomputation."""
LONGEST_RUN = 120.0
"""Seconds: with the median at 15 to 20, all fit into the budget; the first run that compiles takes longer."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model, a method, and how the two sides fit it into memory."""

    preset: str
    method: str
    packs_per_step: int
    train: Json = field(default_factory=dict)
    """Fields of the engine's TrainConfig."""
    tight: Json = field(default_factory=dict)
    """More of them for a GPU with less than LARGE bytes."""
    peers_weights: str = "fp32"
    peers_checkpointing: bool = False
    config: Json = field(default_factory=dict)
    """Fields of the model's config that differ from the preset's."""
    sides: tuple[str, ...] = ()
    """The runs in their order, if not ours, the peers, ours."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.preset}{' too large' if self.config else ''} {self.method}"


COMPILED: Json = {"compile": True}
# The peers keep what is frozen in bf16, and for 8B what trains too: with fp32 weights and moments (131 GB) nothing would fit beside it.
# Ours keeps 8B in bf16 as well, with moments of one byte: about 75 GiB on a large GPU, 62 with all layers recomputed, by estimate.
ROWS = (
    Row(
        "qwen3-8b", "full", 4, peers_weights="bf16", peers_checkpointing=True,
        train={**COMPILED, "weights": "bf16", "optimizer": "adamw_8bit"}, tight={"recompute": "full"},
    ),
    Row("qwen3-8b", "lora", 4, peers_weights="bf16", train=COMPILED),
    Row("qwen3-1.7b", "full", 4, train=COMPILED),
    Row("qwen3-0.6b", "full", 4, train=COMPILED),
    Row("qwen3-1.7b", "lora", 4, peers_weights="bf16", train=COMPILED),
    Row("qwen3-0.6b", "lora", 4, peers_weights="bf16", train=COMPILED),
)  # fmt: skip
DRY_ROWS = (
    Row("qwen3-tiny", "full", 1, config={"vocab_size": 10**12}, sides=("ours",)),  # fits nowhere: the others must run all the same
    Row("qwen3-tiny", "full", 2, sides=("ours", "flattened")),
    Row("qwen3-tiny", "lora", 1, sides=("padded",)),
)


@dataclass(slots=True)
class Clock:
    """The time that is left."""

    end: float

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def main() -> None:
    """Measure every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    parser.add_argument("--rows", help="only rows with this in their name, such as 8b or lora")
    parser.add_argument("--pack-length", type=int, help="tokens, 4096")
    parser.add_argument("--documents", choices=["mixed", "full"], default="mixed", help="full: each document fills a pack")
    parser.add_argument("--train", type=json.loads, default={}, help="JSON of TrainConfig fields, for every row of ours")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    sys.path.append(str(HERE.parent))  # the engine need not be installed
    clock, dry = Clock(time.monotonic() + arguments.budget), arguments.dry_run
    output, length = arguments.output or (None if dry else RESULTS), arguments.pack_length or (128 if dry else 4096)
    rows = [row for row in (DRY_ROWS if dry else ROWS) if not arguments.rows or arguments.rows in row.name]
    ceilings = ask(sys.executable, environment(threads(dry)), min(LONGEST_RUN, clock.left()), "ceilings.py")
    print(json.dumps(ceilings), flush=True)
    result: Json = {
        "ceilings": ceilings,
        "pack_length": length,
        "documents": arguments.documents,
        "date": date.today().isoformat(),
        "rows": {},
    }
    for row in rows:
        with tempfile.TemporaryDirectory() as scratch:
            for found in measure(row, arguments, length, clock, Path(scratch), ceilings):
                result["rows"][row.name] = found
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


def measure(row: Row, arguments: argparse.Namespace, length: int, clock: Clock, scratch: Path, ceilings: Json) -> Iterator[Json]:
    """What is known of a row, after each of its runs."""
    config = {**json.loads((PRESETS / f"{row.preset}.json").read_text(encoding="utf-8")), **row.config}
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    documents = synthetic(length, 16 * row.packs_per_step, min(config["vocab_size"], 150_000), arguments.documents == "full")
    write_packs(documents, length, scratch)
    job = job_of(row, scratch, arguments, tight=(ceilings.get("device_memory") or 0) < LARGE)
    file, flops = job.write(scratch / "job.json"), flops_per_token(scratch, row.method, documents)
    runs: dict[str, list[Json]] = {}
    for side in row.sides or ("ours", *peers(), "ours"):
        if "failed" in runs.get(side, [{}])[0] or clock.left() < 10:
            continue  # it would fail again, or not end in time
        script = ["train_ours.py"] if side == "ours" else ["train_peers.py", side]
        limit = min(LONGEST_RUN, clock.left())
        found = ask(sys.executable, environment(threads(arguments.dry_run)), limit, *script, file)
        print(f"{row.name:25} {side:10} {found.get('failed') or round(found['tokens_per_second'])}", flush=True)
        runs.setdefault(side, []).append(found)
        yield {"gflop_per_token": flops / 1e9, "job": {"packs_per_step": row.packs_per_step, "train": job.train,
               "peers_weights": row.peers_weights, "peers_checkpointing": row.peers_checkpointing},
               "sides": {name: summary(same, flops, ceilings) for name, same in runs.items()}}  # fmt: skip


def job_of(row: Row, scratch: Path, arguments: argparse.Namespace, tight: bool) -> Job:
    """Two steps to warm up, then as many as fit into some seconds; in the dry run two."""
    steps, seconds = (2, 0.0) if arguments.dry_run else (200, 4.0)
    return Job(
        str(scratch), True, str(scratch), row.method, "bf16", row.peers_weights, 1e-5 if row.method == "full" else 1e-4,
        packs_per_step=row.packs_per_step, warmup=2, steps=steps, seconds=seconds, checkpointing=row.peers_checkpointing,
        train={**row.train, **(row.tight if tight else {}), **arguments.train},
    )  # fmt: skip


def peers() -> tuple[str, ...]:
    """The Trainer as people start it, and as fast as it gets with what is installed."""
    return ("padded", "liger" if find_spec("liger_kernel") else "flattened")


def synthetic(pack_length: int, packs: int, vocabulary: int, full: bool) -> Documents:
    """So many packs of random tokens, of which every one is learned."""
    from xtuner_core.data.packing import best_fit

    generator = np.random.default_rng(0)
    spread = 1.0
    middle = np.log(545 / 4096 * pack_length) - spread**2 / 2  # of a lognormal with mean 545 at 4096 tokens a pack
    lengths = np.full(packs, pack_length)
    if not full:
        lengths = np.clip(generator.lognormal(middle, spread, packs * 9), 2, pack_length).astype(np.int64)
    found = best_fit.pack(lengths, pack_length, 0)
    ids = [generator.integers(0, vocabulary, length) for length in lengths[found.slices[:, 0]]]
    every = Documents(ids, ids, np.diff(found.offsets).tolist())
    whole = [pack for pack in every.packs() if every.tokens(pack) > 0.9 * pack_length]
    return every.take(whole[:packs])


def flops_per_token(folder: Path, method: str, documents: Documents) -> float:
    """FLOPs of forward and backward pass that the method needs, by the engine's own count; `folder` has the model's config."""
    from xtuner_core.config import TrainConfig
    from xtuner_core.models.flops import costs_of

    lengths = [len(ids) for ids in documents.ids]
    return costs_of(folder, TrainConfig(method=method)).operations(lengths) / sum(lengths)


def summary(runs: list[Json], flops: float, ceilings: Json) -> Json:
    """The mean of a side's runs, and each of them."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"failed": runs[0]["failed"]}
    from xtuner_core.models.flops import peak_of_name

    speed = statistics.mean(run["tokens_per_second"] for run in good)
    peak = peak_of_name(ceilings.get("device", ""))
    return {
        "tokens_per_second": speed,
        "runs": [run["tokens_per_second"] for run in good],
        "steps": [run["steps"] for run in good],
        "mfu": speed * flops / peak if peak else None,
        "share_of_gemm": speed * flops / (ceilings["gemm_tflops"] * 1e12) if "gemm_tflops" in ceilings else None,
        "peak_memory": max(run["peak_memory"] for run in good),
        "losses": good[0]["losses"][:8],
    }


def threads(dry: bool) -> int:
    """CPU threads of a run."""
    return 1 if dry else 8


def show(result: Json) -> None:
    """The table for people."""
    print(f"\n{'':25} {'side':10} {'tok/s':>9} {'MFU':>7} {'of GEMM':>8} {'GiB':>7} {'ours ×':>7}")
    for name, row in result["rows"].items():
        ours = row["sides"].get("ours", {}).get("tokens_per_second")
        for side, found in row["sides"].items():
            if "failed" in found:
                print(f"{name:25} {side:10} {found['failed']}")
                continue
            mfu, share = (f"{found[key]:.1%}" if found[key] else "-" for key in ("mfu", "share_of_gemm"))
            ratio = f"{ours / found['tokens_per_second']:.2f}" if ours else "-"
            memory = found["peak_memory"] / 2**30
            print(f"{name:25} {side:10} {found['tokens_per_second']:9.0f} {mfu:>7} {share:>8} {memory:7.1f} {ratio:>7}")


if __name__ == "__main__":
    main()
