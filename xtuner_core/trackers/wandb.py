"""Weights & Biases, in `WORK_DIR/wandb`: online if you are logged in, else kept there for `wandb sync`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from xtuner_core.trackers._service import ServiceRun, run_id

PACKAGE = "wandb"


def open_tracker(work_dir: Path, settings: Mapping[str, Any], first_step: int) -> ServiceRun:
    """The work directory's run, made the first time. A step that it has already is passed over by the server.

    `WANDB_PROJECT`, `WANDB_MODE` and wandb's other variables work as everywhere.
    """
    wandb = import_module(PACKAGE)
    logged_in = wandb.login(prompt=False)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "xtuner"),
        name=os.environ.get("WANDB_NAME", work_dir.name),
        id=run_id(work_dir, "wandb"),
        resume="allow",
        dir=work_dir,
        config=dict(settings),
        mode=None if "WANDB_MODE" in os.environ or logged_in else "offline",
        settings=wandb.Settings(console="off"),  # the log is ours
    )
    return ServiceRun(run)
