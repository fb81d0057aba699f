"""The name of a work directory's run at a service, chosen once and kept, so that a run that goes on is found again."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from xtuner_core.durable import write_bytes

FOLDER = "trackers"


def run_id(work_dir: Path, service: str, new: Callable[[], str] = lambda: secrets.token_hex(8)) -> str:
    """The id in `WORK_DIR/trackers/SERVICE`; if there is none, a new one is written there first."""
    file = work_dir / FOLDER / service
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, new().encode())
    return file.read_text(encoding="utf-8")
