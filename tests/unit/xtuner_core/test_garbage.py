"""Collections at steps instead of at any time."""

from __future__ import annotations

import gc
import weakref

import pytest

from xtuner_core.garbage import COLLECT_EVERY, collect_at_steps


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
