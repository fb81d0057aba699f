"""Trackio (Hugging Face), a database in `WORK_DIR/trackio`: `TRACKIO_DIR=WORK_DIR/trackio trackio show`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from xtuner_core.trackers._service import ServiceRun, run_id

PACKAGE = "trackio"


def open_tracker(work_dir: Path, settings: Mapping[str, Any], first_step: int) -> ServiceRun:
    """The work directory's run, made the first time."""
    os.environ.setdefault("TRACKIO_DIR", str(work_dir / "trackio"))  # read when the package is imported
    trackio = import_module(PACKAGE)
    project = os.environ.get("TRACKIO_PROJECT", "xtuner")
    run = trackio.init(project=project, name=f"{work_dir.name}-{run_id(work_dir, PACKAGE)}", resume="allow", config=dict(settings))
    return ServiceRun(run)
