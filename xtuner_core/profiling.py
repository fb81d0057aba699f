"""Where the time and the memory of chosen steps go (`train.profile_step`), as torch's own profiler tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from xtuner_core.config import SftConfig
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World

FOLDER = "profile"
ALLOCATIONS = 1_000_000
"""Allocations and frees that a memory snapshot reaches back."""


@contextmanager
def profiled(step: int, config: SftConfig, world: World) -> Iterator[None]:
    """Around step `step` (from 1): if it was asked for, write what it did to `WORK_DIR/profile/step-N/rank-R/`.

    `trace.json.gz` opens in ui.perfetto.dev or chrome://tracing. With `train.profile_memory` it has memory too, and on a GPU
    `memory.snapshot` opens in pytorch.org/memory_viz (a pickle, which nothing here ever reads).
    """
    if step not in config.train.profile_step:
        yield
        return
    folder = config.work_dir / FOLDER / f"step-{step}" / f"rank-{world.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    cuda, memory = world.device.type == "cuda", config.train.profile_memory
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _snapshot(folder / "memory.snapshot", cuda and memory), profile(activities=activities, profile_memory=memory) as trace:
        yield
    trace.export_chrome_trace(str(folder / "trace.json.gz"))
    say(world.rank, f"profile of step {step} is in {folder}")


@contextmanager
def _snapshot(file: Path, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
