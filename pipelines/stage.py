"""The contract of a stage: a plain function of its settings and inputs that writes a payload and a record.

* payload: the result; the same inputs give the same bytes. Only it makes the digest that later stages depend on.
* record: logs, pictures, timings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe

Log = Callable[[str], None]
"""Takes a line; one that begins with `warning: ` or `error: ` is shown as such."""
Metrics = dict[str, Any]
Progress = Callable[[float, str], None]
"""Told how much of a stage is done (0 to 1), and where it stands in a few words; may be called often."""


def untold(done: float, standing: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Work:
    """Where a running stage reads and writes."""

    inputs: Mapping[str, Path]
    """Input name → payload directory of the artifact it stands for."""
    payload: Path
    record: Path
    scratch: Path
    """For a resumable stage's half-done work; not part of the artifact."""
    cache: Path
    """Tokenized input files, shared by every attempt and run; may be deleted, and what is taken from it must be checked."""
    log: Log
    progress: Progress = untold


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage and everything that decides its bytes.

    `settings(recipe)` is the JSON-able part of the recipe the stage reads, `files(recipe)` the files it reads besides its inputs.
    A `resumable` stage finds its interrupted attempt in its work directory; the others start from an empty one.
    """

    name: str
    version: int
    run: Callable[[Recipe, Work], Metrics]
    settings: Callable[[Recipe], Any]
    files: Callable[[Recipe], list[Path]] = field(default=lambda recipe: [])
    libraries: tuple[str, ...] = ()
    resumable: bool = False
