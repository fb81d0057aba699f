"""When Python looks for garbage: at steps that all ranks share, not whenever one of them has made enough objects."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50
"""Steps between collections, as in XTuner V1."""


@contextmanager
def collect_at_steps() -> Iterator[Callable[[int], None]]:
    """Automatic collection is off inside; what it yields is to be told each finished step and collects at every `COLLECT_EVERY`th.

    A collection stops a rank for a moment, and all ranks wait for the slowest at every exchange, so each rank's own moments would add up
    (Megatron-LM's `--manual-gc`). What exists already, the model and the libraries, is not looked at again.
    """

    def finished(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect()

    before = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield finished
    finally:
        gc.unfreeze()
        if before:
            gc.enable()
