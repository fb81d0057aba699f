"""`new-data`: looks for new training files every quarter of an hour, and starts the run that learns them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.states import Completed
from pydantic import Field

from flows.caching import failed
from flows.parameters import DEMO, AskedRecipe
from pipelines import model_registry, retraining
from pipelines.artifacts import Store
from pipelines.model_registry import Version
from pipelines.recipe import Recipe
from xtuner_core.errors import UserError, from_os_error

DEPLOYMENT = "finetune-flow/weekly"
"""Of its runs only one is at work at a time."""
BUSY = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
SHOWN = 5


@flow(name="new-data", flow_run_name="new-data", persist_result=False)
def new_data(
    recipe: AskedRecipe = DEMO,
    changes: tuple[str, ...] = (),
    store: Path = Path("artifacts"),
    settle_seconds: Annotated[float, Field(ge=0)] = 60,
) -> State[Any]:
    """Start the recipe's run if there are training files that its newest version has not seen. The same files start one run only, however
    that ends. The very first training is never started from here.

    Args:
        recipe: The name of a shipped recipe (`xtuner list-cfg`), a YAML file on the machine that runs it, or the whole recipe.
        changes: Fields that differ from the recipe, each as field=value.
        store: Folder of the artifacts, on the machine that runs it; relative to the project.
        settle_seconds: A file that changed in the last so many seconds may still be copied; the next look takes it.
    """
    try:
        asked = retraining.asked(recipe, changes)
        given = {"recipe": recipe if isinstance(recipe, str) else recipe.model_dump(mode="json"), "changes": list(changes)}
        told = _look(asked, given, Store(store), settle_seconds)
    except UserError as error:
        return failed(error)
    except OSError as error:
        return failed(from_os_error(error))
    get_run_logger().info(told)
    return Completed(message=told)


def _look(asked: Recipe, given: dict[str, Any], store: Store, settle_seconds: float) -> str:
    """Start the run if it is time to; what was found, in a line."""
    last = retraining.newest_made(asked, store)
    if last is None:
        return f"no version of {model_registry.model_name(asked)} was made by {asked.name} yet; start its first training by hand"
    files = [one.file for one in retraining.training_inputs(asked)]
    if fresh := unsettled(files, settle_seconds, time.time()):
        return f"still changing, or changed in the last {settle_seconds:g} s: {_named(fresh)}; the next look takes what has come by then"
    new = retraining.new_files(asked, store, last)
    if not new:
        return f"no new data: {last.title} was trained on what the files of data.train hold"
    return _start(asked, given, store, last, new)


def unsettled(files: Sequence[Path], seconds: float, now: float) -> list[Path]:
    """The files that changed in the last so many seconds, by the time that the kernel keeps: what copies a file may set the other one."""
    return [file for file in files if now - file.stat().st_ctime < seconds]


def key_of_data(recipe: Recipe, store: Store, digests: Sequence[str]) -> str:
    """The same for the same recipe, store and new files, wherever those lie."""
    return hashlib.sha256(json.dumps([recipe.name, str(store.root), *sorted(digests)]).encode()).hexdigest()


def _start(asked: Recipe, given: dict[str, Any], store: Store, last: Version, new: Sequence[Path]) -> str:
    key = key_of_data(asked, store, store.file_digests(new))
    found = f"new files since {last.title}: {_named(new)}"
    with get_client(sync_client=True) as client:
        if earlier := _started_with(client, key):
            state = earlier.state.name if earlier.state else "unknown"
            return f"{found}; a run was started for them already, {earlier.name}: {state}. It is not started again: run the recipe by hand"
        if busy := _busy(client):
            return f"{found}; {busy.name} is at work, the next look starts a run for them"
    parameters = {**given, "store": str(store.root), "trigger": "new-data"}
    run: Any = run_deployment(DEPLOYMENT, parameters=parameters, timeout=0, idempotency_key=key, as_subflow=False)
    emit_event(
        "finetune.data.arrived",
        {"prefect.resource.id": f"finetune.model.{model_registry.model_name(asked)}"},
        payload={"files": [file.name for file in new], "since": last.title, "flow_run": str(run.id)},
    )
    return f"{found}; started {run.name}"


def _started_with(client: SyncPrefectClient, key: str) -> FlowRun | None:
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])))
    return runs[0] if runs else None


def _busy(client: SyncPrefectClient) -> FlowRun | None:
    at_work = FlowRunFilter.model_validate({"state": {"type": {"any_": list(BUSY)}}})
    runs = client.read_flow_runs(flow_filter=FlowFilter.model_validate({"name": {"any_": ["finetune-flow"]}}), flow_run_filter=at_work)
    return runs[0] if runs else None


def _named(files: Sequence[Path]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(file.name for file in files[:SHOWN]) + more
