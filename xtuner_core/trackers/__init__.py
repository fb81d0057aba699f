"""Trackers (`train.trackers`): where a run's numbers are shown beside the log, one module each, found by its name.

A module has `PACKAGE`, what must be installed, and `open_tracker(work_dir, settings, first_step) -> Tracker`, called on rank 0 with
all that decides the run and the number of steps that are done. What it keeps lies below the work directory, so that a run that goes on
finds it. A tracker may raise whatever it likes: it is then left out, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from xtuner_core import registry
from xtuner_core.errors import RecipeError


class Tracker(Protocol):
    """One run, open."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show finite numbers by name after step `step` (from 1); a step may come again, with other names."""
        ...

    def close(self) -> None: ...


def require_installed(names: Sequence[str]) -> None:
    """Refuse, before anything is made, an unknown tracker and one whose package is missing (RecipeError)."""
    for name in names:
        package = registry.find(sys.modules[__name__], name).PACKAGE
        if importlib.util.find_spec(package) is None:
            raise RecipeError(f"train.trackers: {name} needs a package that is not installed: pip install {package}.")
