"""What a running stage says, in the Prefect UI: log lines by their level, and how far it is as a progress artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from pipelines.stage import Log, Progress

UPDATE_SECONDS = 5.0
_LEVELS: Mapping[str, int] = {"warning: ": logging.WARNING, "error: ": logging.ERROR}
Logger = logging.Logger | logging.LoggerAdapter[Any]


@contextmanager
def signs_of_life(wanted: bool) -> Iterator[None]:
    """Whether flow runs in the block send heartbeats; what ends at once does without: Prefect 3.8 waits a second for their thread."""
    with temporary_settings({} if wanted and PREFECT_API_URL.value() else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def by_level(logger: Logger) -> Log:
    """A stage's `log` that writes to Prefect's."""

    def log(line: str) -> None:
        for beginning, level in _LEVELS.items():
            if line.startswith(beginning):
                return logger.log(level, line.removeprefix(beginning))
        logger.info(line)

    return log


def live_progress(node: str, logger: Logger, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A stage's `progress` as an artifact of its task, renewed every few seconds; an absent server neither fails nor delays the stage."""
    artifact: UUID | None = None
    told = float("-inf")

    def progress(done: float, standing: str) -> None:
        nonlocal artifact, told
        if done < 1 and clock() - told < UPDATE_SECONDS:
            return
        told = clock()
        shown, description = round(100 * done, 1), f"{node}: {standing}"
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                if artifact:
                    update_progress_artifact(artifact_id=artifact, progress=shown, description=description)
                else:
                    artifact = cast(UUID, create_progress_artifact(progress=shown, description=description))  # no coroutine: not awaited
        except Exception as error:  # whatever is wrong with what is only shown, training goes on
            logger.debug("progress is not shown: %r", error)

    return progress
