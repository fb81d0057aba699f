"""Collections at steps instead of at any time, and a long run that takes no more memory than a short one for all that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from xtuner_core import garbage, trainer
from xtuner_core.config import SftConfig
from xtuner_core.garbage import COLLECT_EVERY, collect_at_steps
from xtuner_core.guards import History
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest


class Ring:
    """Refers to itself, so only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


def test_a_cycle_lives_until_a_shared_step() -> None:
    with collect_at_steps() as finished:
        dropped = weakref.ref(Ring())
        for step in range(1, COLLECT_EVERY):
            _ = [[] for _ in range(1000)]  # enough for an automatic collection
            finished(step)
        assert dropped() is not None
        finished(COLLECT_EVERY)
        assert dropped() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_collection_is_as_before_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), collect_at_steps():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    assert gc.isenabled()
    gc.disable()
    try:
        with collect_at_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_hundred_and_twenty_steps_leave_nothing_behind(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident: list[int] = []
    objects: list[int] = []
    train_step = trainer.train_step

    def observed(*arguments: Any) -> tuple[float, float, History]:
        if arguments[-1] % 20 == 0:
            resident.append(psutil.Process().memory_info().rss)
            objects.append(len(gc.get_objects()))
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", observed)
    monkeypatch.setattr(garbage, "COLLECT_EVERY", 20)
    trainer.train(sft_config(total_step=6 * 20 + 1, lr=1e-4), world, stop)
    assert objects[6] - objects[2] < 400
    assert resident[6] - resident[2] < 20 * 2**20
