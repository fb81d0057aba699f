"""The store is the truth, Prefect shows it: a hit ends in the state `Cached`, a user's mistake in `Failed` without a traceback."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from prefect import State
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from pipelines.artifacts import Result
from xtuner_core.errors import DataError, Interrupted, UserError

TIMED_OUT = "TimedOut"
"""Prefect's name for it."""


def _without_traceback(record: logging.LogRecord) -> bool:
    """Prefect's engine takes the error of a failed run for an unexpected one; the run's state has told it already."""
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.msg, record.args, record.exc_info = f"The run failed: {record.exc_info[1]}", None, None
    return True


logging.getLogger("prefect.engine").addFilter(_without_traceback)


class Unfit(DataError):
    """The model was made, but does not pass its gate or chat test; `told` is what the run reports all the same."""

    def __init__(self, message: str, told: tuple[dict[str, Any], str]) -> None:
        super().__init__(message)
        self.told = told


def finished(result: Result) -> State[Any]:
    """`Cached` if the artifact was there and whole, else `Completed`; the message names the artifact.

    Prefect's own cache would only compare keys and could serve an artifact that was deleted or damaged since.
    """
    if result.cached:
        return Completed(name="Cached", message=f"whole in the store: {result.artifact.path}", data=result)
    return Completed(message=f"made in {result.seconds:.1f} s: {result.artifact.path}", data=result)


def failed(error: UserError) -> State[Any]:
    """A failure that the user can mend. What was interrupted is none: of a deployment it is `Crashed`, which runs again and continues."""
    if not isinstance(error, Interrupted):
        return Failed(message=str(error), data=error)
    ended = Crashed if deployment.id else Cancelled
    return ended(message=str(error), data=error)


def stopped(node: str, signal: TerminationSignal) -> State[Any]:
    """Of a task that SIGTERM ended: `Cancelled` if someone asked for it, else `Crashed`. The flow raises the signal again (`ended_in`)."""
    ended = Cancelled if _is_being_cancelled() else Crashed
    return ended(message=f"stopped in {node}; finished stages are kept, the next run goes on from there.", data=signal)


def _is_being_cancelled() -> bool:
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run.id)).state
    except Exception:  # the server is away; what is ending must not wait for it
        return False
    return state is not None and state.is_cancelling()


def ended_in(node: str, state: State[Any], hours: float | None) -> State[Any]:
    """How a run ends whose task `node` ended in `state`, without a result.

    Raises:
        TerminationSignal: it was a signal that ended the task; Prefect's engine knows what to do.
    """
    if state.name == TIMED_OUT:
        error = Interrupted(f"timeout_hours: {hours:g} h were over in {node}; finished stages are kept, the next run goes on from there.")
        return Failed(name=TIMED_OUT, message=str(error), data=error)
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, TerminationSignal):
        raise outcome
    return failed(outcome) if isinstance(outcome, UserError) else state
