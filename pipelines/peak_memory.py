"""How much memory this process and all that it started have at the worst moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

SECONDS = 1.0
"""Between two looks; a look takes some milliseconds, and a shorter peak is missed."""


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Look now and then while the block runs; what is given tells the largest sum of resident bytes so far, pages that processes share
    counted for each of them.
    """
    seen, done = [_resident()], Event()

    def watch() -> None:
        while not done.wait(SECONDS):
            seen[0] = max(seen[0], _resident())

    watcher = Thread(target=watch, name="peak memory", daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        watcher.join()
        seen[0] = max(seen[0], _resident())


def _resident() -> int:
    import psutil

    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total
