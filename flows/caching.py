"""The store is the truth, Prefect shows it: a hit ends in the state `Cached`, a user's mistake in `Failed` without a traceback."""

from __future__ import annotations

from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from pipelines.artifacts import Result
from xtuner_core.errors import UserError


def finished(result: Result) -> State[Any]:
    """`Cached` if the artifact was there and whole, else `Completed`; the message names the artifact.

    Prefect's own cache would only compare keys and could serve an artifact that was deleted or damaged since.
    """
    if result.cached:
        return Completed(name="Cached", message=f"whole in the store: {result.artifact.path}", data=result)
    return Completed(message=f"made in {result.seconds:.1f} s: {result.artifact.path}", data=result)


def failed(error: UserError) -> State[Any]:
    """A failure that the user can mend."""
    return Failed(message=str(error), data=error)
