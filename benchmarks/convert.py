"""How fast weights are converted, beside `cp` of what is written and torch's own consolidation of the same checkpoint.

copy, copy bf16     `cp -r` of the exported fp32 folder, of the bf16 one
export              fp32 checkpoint of two processes → Hugging Face folder
export, checked     the same, and every number is looked at for NaN and infinity, as the convert stage does
cast                fp32 checkpoint → bf16 folder, rounded once, and checked
merge               bf16 base + LoRA of rank 16 on all linear layers → bf16 folder (fp32 inside, rounded once, checked)
consolidation       torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files

All sides run in turn, round after round, on files of the same folder (and file system) that are in the page cache; a side has ended when
what it wrote is on the disk (fsync), and its files are deleted before the next. The model has layers of the sizes of SmolLM2-1.7B.

python benchmarks/convert.py [--folder .] [--rounds 5] [--quick]     writes benchmarks/results/convert.json; about 2 minutes, 6 GB of disk
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import TensorSpec, serialize_file
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from xtuner_core.durable import sync_tree
from xtuner_core.export.checkpoint import open_checkpoint, outline, to_hugging_face
from xtuner_core.export.merge import merge
from xtuner_core.export.tensors import Lazy, finite, open_folder, write_file, write_folder

RESULTS = Path(__file__).resolve().parent / "results" / "convert.json"
PROCESSES, THREADS = 2, 2
LARGE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
SMALL = {**LARGE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000}
Shapes = Mapping[str, tuple[int, ...]]
Side = Callable[[Path], object]
"""Writes to a new folder."""
COPIES = {"export": "copy", "export, checked": "copy", "consolidation": "copy", "cast": "copy bf16", "merge": "copy bf16"}
"""What each side is compared with: `cp` of as many bytes."""


def main() -> None:
    """Measure every side and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, one round; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as scratch:
        folder = Path(scratch)
        shapes = prepare(folder, SMALL if arguments.quick else LARGE)
        sides = all_sides(folder, shapes)
        count = 1 if arguments.quick else arguments.rounds
        rounds = [{name: measure(side, folder / "out") for name, side in sides.items()} for _ in range(count)]
    result = {"what": "medians of seconds until all is on the disk", **table(rounds, shapes), "rounds": len(rounds), **machine()}
    print(json.dumps(result, indent=2))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# What is converted ------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, config: Mapping[str, Any]) -> Shapes:
    """The checkpoint, the base (with the same numbers), an adapter; and both forms of the export, for `cp`."""
    for part in ("base", "adapter", "checkpoint/tensors", "fp32"):
        (folder / part).mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = outline(folder / "base")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    numbers = torch.randn(max(map(math.prod, shapes.values()))) * 0.02  # of every tensor
    for rank in range(PROCESSES):
        save_part(folder / "checkpoint" / "tensors", rank, shapes, numbers)
    write_folder(open_checkpoint(folder / "checkpoint"), folder / "fp32")
    write_folder({name: tensor.to(torch.bfloat16) for name, tensor in open_folder(folder / "fp32").items()}, folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = {name: Lazy.of(torch.randn(tensor.shape) * 0.01) for name, tensor in get_peft_model_state_dict(adapted).items()}
    adapted.peft_config["default"].save_pretrained(str(folder / "adapter"))
    write_file(folder / "adapter" / "adapter_model.safetensors", adapter)
    return shapes


def save_part(folder: Path, rank: int, shapes: Shapes, numbers: torch.Tensor) -> None:
    """The rows of one process, as torch.distributed.checkpoint saves them."""
    rows = {name: (shape[0] // PROCESSES, *shape[1:]) for name, shape in shapes.items()}
    told = {name: {"saved_offsets": [rank * shape[0], *[0] * (len(shape) - 1)]} for name, shape in rows.items()}
    parts = {
        name: TensorSpec(dtype="float32", shape=shape, data_ptr=numbers.data_ptr(), data_len=4 * math.prod(shape))
        for name, shape in rows.items()
    }
    metadata = {"DCP_SHARDING_INFO": json.dumps(told), "DCP_VERSION": "1.0", "format": "pt"}
    serialize_file(parts, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata)


# The sides --------------------------------------------------------------------------------------------------------------------------


def all_sides(folder: Path, shapes: Shapes) -> dict[str, Side]:
    """Name → what to measure."""

    def opened() -> dict[str, Lazy]:
        return to_hugging_face(folder / "base", open_checkpoint(folder / "checkpoint"))

    def copy(source: Path) -> Side:
        return lambda target: subprocess.run(["cp", "-r", str(source), str(target)], check=True)

    def exported(tensors: Callable[[], dict[str, Lazy]]) -> Side:
        def export(target: Path) -> None:
            target.mkdir()
            write_folder(tensors(), target)

        return export

    def consolidate(target: Path) -> None:
        target.mkdir()
        consolidate_safetensors_files(str(folder / "checkpoint" / "tensors"), str(target), dict.fromkeys(shapes, 1), num_threads=THREADS)

    return {
        "copy": copy(folder / "fp32"),
        "export": exported(opened),
        "export, checked": exported(lambda: finite(opened())),
        "copy bf16": copy(folder / "base"),
        "cast": exported(lambda: finite({name: tensor.to(torch.bfloat16) for name, tensor in opened().items()})),
        "merge": lambda target: merge(folder / "base", [(folder / "adapter", 1.0)], target),
        "consolidation": consolidate,
    }


def measure(side: Side, target: Path) -> float:
    """Seconds until what it writes is on the disk."""
    began = time.perf_counter()
    side(target)
    sync_tree(target)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def table(rounds: list[dict[str, float]], shapes: Shapes) -> dict[str, Any]:
    """Of each side the seconds, how fast it writes, and how many times as fast as `cp` and as torch's consolidation it is."""
    size = 4 * sum(map(math.prod, shapes.values()))
    seconds = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    sides = {}
    for name, spent in seconds.items():
        written = size / 2 if "bf16" in (name, COPIES.get(name, name))[-1] else size
        row = {"seconds": round(spent, 3), "MB_per_second": round(written / spent / 1e6)}
        sides[name] = row | ({"times_cp": round(seconds[COPIES[name]] / spent, 2)} if name in COPIES else {})
    ratio = seconds["consolidation"] / seconds["export"]
    return {"fp32_bytes": size, "sides": sides, "export_times_consolidation": round(ratio, 1)}


def machine() -> dict[str, str]:
    """Where, with what and when."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors"))
    what = f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads, Linux {platform.release()}"
    return {"machine": what, "versions": versions, "date": date.today().isoformat()}


if __name__ == "__main__":
    main()
