"""What trackers of a service share: a run's name, chosen once and kept, so that a run that goes on is found again; and the run itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xtuner_core.durable import write_bytes

FOLDER = "trackers"


def run_id(work_dir: Path, service: str, new: Callable[[], str] = lambda: secrets.token_hex(8)) -> str:
    """The id in `WORK_DIR/trackers/SERVICE`; if there is none, a new one is written there first."""
    file = work_dir / FOLDER / service
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, new().encode())
    return file.read_text(encoding="utf-8")


class ServiceRun:
    """A run as wandb's API has it, which others copy."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
