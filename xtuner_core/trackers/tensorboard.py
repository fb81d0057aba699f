"""TensorBoard event files in `WORK_DIR/tensorboard`: `tensorboard --logdir WORK_DIR/tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "tensorboard"
FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The steps after the checkpoint come again; TensorBoard then drops what an earlier file tells of them.
        self.writer = SummaryWriter(folder, purge_step=first_step + 1, flush_secs=FLUSH_SECONDS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def open_tracker(work_dir: Path, settings: Mapping[str, Any], first_step: int) -> _TensorBoard:
    """A new event file beside those of earlier runs in this work directory, which TensorBoard shows as one run."""
    tracker = _TensorBoard(work_dir / FOLDER, first_step)
    tracker.writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2)}\n```", first_step + 1)
    return tracker
