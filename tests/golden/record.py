"""Losses of the recipe `qwen3_tiny_full_openai`, trained on this machine with one thread, as it is (bf16) and in fp32.

    python tests/golden/record.py            write them to qwen3_tiny_full_openai.json: after a change that is meant to change them
    python tests/golden/record.py --print    only show them

Commit the new file together with the change, and say in the message why the numbers moved.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPE = "qwen3_tiny_full_openai"
FILE = Path(__file__).resolve().parent / f"{RECIPE}.json"
PROCESSOR = {"GenuineIntel", "AuthenticAMD", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16"}
"""Words of /proc/cpuinfo by which the libraries below torch choose other kernels, with other rounding."""


def train(dtype: str, store: Path) -> list[float]:
    """The loss of every step, through the real stages."""
    from pipelines.artifacts import Store
    from pipelines.recipe import load_recipe
    from pipelines.runner import run_until

    os.environ["OMP_NUM_THREADS"] = "1"  # handed on to the training process
    result = run_until("train", load_recipe(RECIPE, [f"train.dtype={dtype}"]), Store(store), lambda line: print(line, file=sys.stderr))
    rows = (result.artifact.record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["total_loss"] for row in rows]


def conditions() -> dict[str, Any]:
    """What decides the last bits of the numbers."""
    import torch

    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return {
        "torch": torch.__version__.split("+")[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": sorted(words & PROCESSOR),
        "threads": 1,
    }


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = {dtype: train(dtype, Path(folder)) for dtype in ("bf16", "fp32")}
    text = json.dumps({"conditions": conditions(), "losses": losses}, indent=2) + "\n"
    if "--print" in arguments:
        print(text)
    else:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
