"""Whether a run has anything to learn; one that nobody asked for by hand ends here if not, in seconds."""

from __future__ import annotations

from prefect import State, get_run_logger
from prefect.states import Completed

from pipelines import retraining
from pipelines.artifacts import Store
from pipelines.recipe import Recipe


def nothing_to_learn(asked: Recipe, today: Recipe, store: Store, trigger: str) -> State[None] | None:
    """Log where training begins and what is new since the newest version; the state of a run that need not be, else None."""
    log = get_run_logger().info
    log(retraining.beginning(asked, store).why)
    if told := retraining.nothing_new(today, store):
        log(told)
        return None if trigger == "hand" else Completed(message=told)
    if found := retraining.news(today, store):
        more = len(found.changes) - retraining.SHOWN
        shown = "; ".join(found.changes[: retraining.SHOWN])
        log(f"new since {found.since.title}: {shown}{f'; and {more} more' if more > 0 else ''}")
    return None
