"""Profiles of the steps that were asked for, and of no other."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from xtuner_core import trainer
from xtuner_core.config import SftConfig
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest


def test_a_trace_of_each_step_that_was_asked_for(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    trainer.train(sft_config(total_step=3, profile_step=[2, 9], profile_memory=True), world, stop)
    [trace] = [file for file in (tmp_path / "profile").rglob("*") if file.is_file()]
    assert trace == tmp_path / "profile" / "step-2" / "rank-0" / "trace.json.gz"
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if "name" in event}
    assert "aten::mm" in names and any(name.startswith("autograd::engine") for name in names)
    assert "[memory]" in names


def test_without_there_is_nothing(world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path) -> None:
    trainer.train(sft_config(total_step=1), world, stop)
    assert not (tmp_path / "profile").exists()
