"""One thin task for each node of the pipeline; the work is in `pipelines`."""

from __future__ import annotations

import logging
from typing import Any

from prefect import State, Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal

from flows.accelerator import accelerator
from flows.caching import failed, finished, stopped
from flows.live import by_level, live_progress
from pipelines.artifacts import Artifact, Store
from pipelines.pipeline import Node
from pipelines.recipe import Recipe
from pipelines.runner import run_node
from xtuner_core.errors import UserError, from_os_error

# Prefect logs a returned failure twice, once with an empty traceback; the line "Finished in state Failed(...)" says it all.
logging.getLogger("prefect.task_runs").addFilter(lambda record: "Task run failed with state" not in record.getMessage())


def task_of(node: Node, seconds: float | None = None) -> Task[..., Any]:
    """The Prefect task that makes the node's artifact or finds it, in at most so many seconds.

    Call it, do not submit it: in another thread its children would end with that thread, and a time limit would wait for them.
    """

    @task(name=node.name, task_run_name=node.name, cache_policy=NO_CACHE, persist_result=False, timeout_seconds=seconds)
    def make(recipe: Recipe, store: Store, made: dict[str, Artifact]) -> State[Any]:
        logger = get_run_logger()
        try:
            return finished(run_node(node, recipe, store, made, by_level(logger), live_progress(node.name, logger), accelerator))
        except UserError as error:
            return failed(error)
        except OSError as error:
            return failed(from_os_error(error))
        except TerminationSignal as signal:
            return stopped(node.name, signal)

    return make
