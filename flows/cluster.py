"""Tokenizing on a cluster: one task for each input file, mapped by Dask or Ray; the shards land in the store's cache.

Every machine must see the store and the input files at the same paths. A cluster that runs already is named by its own variable,
DASK_SCHEDULER_ADDRESS or RAY_ADDRESS; otherwise one is started on this machine and ended with the subflow.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from prefect.task_runners import TaskRunner

from flows.caching import failed
from pipelines import prepare
from pipelines.artifacts import Artifact, Store
from pipelines.pipeline import plan
from pipelines.recipe import Recipe
from xtuner_core.data import shards
from xtuner_core.errors import RecipeError, UserError, from_os_error

_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


def require_runner(recipe: Recipe) -> None:
    """Tell before the first stage that the chosen cluster's package is missing.

    Raises:
        RecipeError: names the extra to install.
    """
    name = recipe.data.runner
    if name != "local" and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise RecipeError(f"data.runner {name}: not installed; pip install 'xtuner-pipeline[{name}]', or use data.runner=local.")


def fill_cache(recipe: Recipe, store: Store, base: Artifact) -> State[Any] | None:
    """Tokenize on the recipe's cluster what the prepare stage will ask the cache for; None if it has nothing to ask."""
    step = next(step for step in plan(recipe, store) if step.node.stage is prepare.STAGE)
    if recipe.data.runner == "local" or step.state == "cached":
        return None
    on_cluster = tokenize_files.with_options(task_runner=_runner(recipe))
    return on_cluster(recipe, base.payload / "model", store.cache, return_state=True)


@flow(name="tokenize-files", persist_result=False)
def tokenize_files(recipe: Recipe, model_dir: Path, cache: Path) -> State[Any]:
    """Map the missing files over the cluster; ends in the first user's mistake that one of them reports."""
    log = get_run_logger().info
    try:
        jobs = prepare.plan(recipe, model_dir, log).jobs
    except UserError as error:
        return failed(error)
    missing = {job.key: job for job in jobs if not shards.is_whole(cache, job, log)}
    futures = tokenize_file.map(list(missing.values()), cache=cache)
    futures.wait()
    outcomes = [future.state.result(raise_on_failure=False) for future in futures]
    for outcome, future in zip(outcomes, futures, strict=True):
        if isinstance(outcome, Exception):
            return failed(outcome) if isinstance(outcome, UserError) else future.state
    return Completed(message=f"{len(missing)} files tokenized, {len(jobs) - len(missing)} were in the cache")


@task(name="tokenize", cache_policy=NO_CACHE, persist_result=False)
def tokenize_file(job: Any, cache: Path) -> State[Any]:
    """One file, on whatever machine the cluster chose."""
    try:
        shards.tokenize([job], cache, 1, get_run_logger().info)
        return Completed(message=job.file.name)
    except UserError as error:
        return failed(error)
    except OSError as error:
        return failed(from_os_error(error))


def _runner(recipe: Recipe) -> TaskRunner[Any]:
    processes = recipe.data.workers or len(os.sched_getaffinity(0))
    if recipe.data.runner == "dask":
        from prefect_dask.task_runners import DaskTaskRunner

        if address := os.environ.get("DASK_SCHEDULER_ADDRESS"):
            return DaskTaskRunner(address=address)
        here = {"n_workers": processes, "threads_per_worker": 1, "dashboard_address": None}
        return DaskTaskRunner(cluster_kwargs=here)
    from prefect_ray.task_runners import RayTaskRunner  # pyright: ignore[reportMissingImports] - an extra that few install

    here = {"num_cpus": processes, "include_dashboard": False}
    return RayTaskRunner(init_kwargs={} if "RAY_ADDRESS" in os.environ else here)
