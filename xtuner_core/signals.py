"""A signal asks the loop to stop at the next step; a rank whose launcher died does not train on alone."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from xtuner_core.errors import Interrupted, UserError

_PR_SET_PDEATHSIG = 1
ONE_REQUEST_SECONDS = 3.0
"""Slurm signals every process of a job, and torchrun then hands the same SIGTERM on to its ranks."""


class StopRequest:
    """Set by SIGTERM or SIGINT; the second signal ends the process at once, unless it is a SIGTERM right after the first."""

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._at_once = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGTERM and time.monotonic() - self._since < ONE_REQUEST_SECONDS:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self._since = True, time.monotonic()
        if self._at_once:
            raise KeyboardInterrupt  # not an Exception: hardly a library takes it for a failure of its own

    @contextmanager
    def at_once(self, doing: str) -> Iterator[None]:
        """While the block runs a signal ends it: what is done there (`doing`, for the message) is nothing that could be lost.

        Raises:
            Interrupted: a signal came, before or within; also where another rank's end, or a library that took the signal for a failure
                (torch's reader of checkpoints does), made this one fail.
        """
        self._at_once = True
        try:
            if not self.asked:
                yield
        except (KeyboardInterrupt, RuntimeError, UserError):
            if not self.asked:
                raise
        finally:
            self._at_once = False
        if self.asked:
            raise Interrupted(f"stopped while {doing}; the same command continues from there.")


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGTERM when the parent ends: process `parent`, or whichever it is now.

    torchrun starts each rank in a session of its own, so killing torchrun would leave the ranks training (pytorch issue 113231).
    A parent that died before this call is noticed when the ranks meet: torchrun hosts the store they meet at.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("the launcher is gone")
