"""What rank 0 does alone, before any process group exists: no collective can time out while it works, however long that takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

POLL_SECONDS = 0.2
_KEY = "made by rank 0"
Share = Callable[[Callable[[], str]], str]
"""Takes what makes a text; gives that text on every rank, after rank 0 alone has made it."""


def sharing() -> Share:
    """How ranks share what one of them makes: over the store that torchrun hosts, under which they meet later.

    A rank that waits only looks into the store now and then, so it hears signals. If rank 0 fails, the launcher ends the others;
    if the launcher is gone, so is its store. Without torchrun this process is the only one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return lambda make: make()
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(iter(rendezvous("env://")))

    def share(make: Callable[[], str]) -> str:
        if rank == 0:
            store.set(_KEY, made := make())
            return made
        while not store.check([_KEY]):
            time.sleep(POLL_SECONDS)
        return store.get(_KEY).decode()

    return share
