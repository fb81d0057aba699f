"""What a run's version becomes, on a real server: by the gate, by a person who is waited for, and back by a rollback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from flows.service import Service
from pipelines import model_registry
from pipelines.artifacts import Store
from pipelines.model_registry import Version
from pipelines.recipe import PROJECT
from tests.service.conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS = 900
"""For one run on a busy machine."""


def start(service: Service, model: str, *changes: str) -> UUID:
    """A run of the deployment for this model; what other tests of the server made is there already."""
    asked = {"recipe": str(TINY), "changes": [f"promotion.model={model}", *changes], "store": str(service.store)}
    with get_client(sync_client=True) as client:
        deployed = client.read_deployment_by_name("finetune-flow/finetune-flow")
        return client.create_flow_run_from_deployment(deployed.id, parameters=asked).id


def wait(run: UUID, *names: str) -> FlowRun:
    """Until the run is in a state of one of these names."""
    with get_client(sync_client=True) as client:
        until(lambda: client.read_flow_run(run).state_name in names, lambda: client.read_flow_run(run).state)
        return client.read_flow_run(run)


def until(look: Callable[[], Any], told: Callable[[], object] = str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.3)
    return found


def events(model: str, *whats: str) -> list[dict[str, Any]]:
    """The events of a model, oldest first, as soon as there are so many."""
    wanted = {"filter": {"event": {"prefix": ["finetune.model."]}, "resource": {"id": [f"finetune.model.{model}"]}, "order": "ASC"}}
    with get_client(sync_client=True) as client:

        def look() -> list[dict[str, Any]]:
            found = client.request("POST", "/events/filter", json=wanted).json()["events"]
            return found if len(found) >= len(whats) else []

        found = until(look)
    assert [event["event"] for event in found] == [f"finetune.model.{what}" for what in whats]
    return found


def in_use(service: Service, model: str) -> Version | None:
    return model_registry.production(Store(service.store), model)


def status(service: Service, title: str) -> str:
    store = Store(service.store)
    return model_registry.status(store, model_registry.find(store, title))


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.cli", *words], cwd=PROJECT, capture_output=True, text=True, check=False)


def answer(run: UUID, **given: str) -> None:
    """What the form in the UI sends."""
    with get_client(sync_client=True) as client:
        told = client.request("POST", "/flow_runs/{id}/resume", path_params={"id": run}, json={"run_input": given}).json()
    assert told["status"] == "ACCEPT", told


def processes(run: UUID) -> list[psutil.Process]:
    """Those that the worker started for the run, and theirs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run):
                found.append(process)
    return found


def task_states(run: UUID) -> list[tuple[str, str | None]]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])), limit=100)
    return [(task.name, task.state_name) for task in sorted(found, key=lambda task: str(task.start_time))]


def test_the_gate_promotes_and_a_rollback_is_told_to_the_server(service: Service) -> None:
    gated = wait(start(service, "gated", "promotion.when=gate"), "Completed", "Failed")
    assert gated.state and gated.state.message == "all stages are whole; gated@1 is in production"
    second = wait(start(service, "gated", "promotion.when=gate", "eval.confidence=0.9"), "Completed", "Failed")
    assert second.state and second.state.message == "all stages are whole; gated@2 is in production"
    done = shell("rollback", "gated", "--why", "rude answers", "--store", str(service.store))
    assert done.returncode == 0, done.stderr
    assert in_use(service, "gated") == model_registry.find(Store(service.store), "gated@1")
    last = events("gated", "registered", "promoted", "registered", "promoted", "rolled-back")[-1]
    assert last["resource"]["prefect.resource.name"] == "gated@1"
    assert (last["payload"]["version"], last["payload"]["why"]) == (1, "rude answers")
    assert last["payload"]["serve"] == str(service.store / "models/gated/production/model")
    with get_client(sync_client=True) as client:
        table = client.request("GET", "/artifacts/{key}/latest", path_params={"key": "gated-versions"}).json()
        variable = client.request("GET", "/variables/name/{name}", path_params={"name": "production_gated"}).json()
    assert table["description"] == "In production: gated@1"
    assert variable["value"] == "gated@1"


def test_a_person_is_waited_for_without_a_process_and_decides_about_what_was_shown(service: Service) -> None:
    run = start(service, "asked", "promotion.when=approval")
    suspended = wait(run, "Suspended", "Completed", "Failed")
    assert suspended.state and suspended.state.name == "Suspended"
    assert status(service, "asked@1") == "candidate"
    until(lambda: not processes(run), lambda: processes(run))
    with get_client(sync_client=True) as client:
        keys = suspended.state.state_details.run_input_keyset or {}
        shown = client.read_flow_run_input(run, keys["description"])
        schema = client.read_flow_run_input(run, keys["schema"])
        refused = client.request(
            "POST", "/flow_runs/{id}/resume", path_params={"id": run}, json={"run_input": {"approve": "perhaps"}}
        ).json()
    assert "**asked@1** would go into production as the first one" in shown
    assert "Put it into production?" in schema
    assert refused["status"] == "REJECT"
    before = len(task_states(run))
    answer(run, approve="yes", name="Ada", comment="reads well")
    done = wait(run, "Completed", "Failed", "Crashed")
    assert done.state and done.state.message == "all stages are whole; asked@1 is in production"
    again = task_states(run)[before:]
    assert {state for _, state in again} == {"Cached"}
    assert [name for name, _ in again] == ["base", "prepare", "train", "convert", "eval-base", "eval", "verdict", "chat"]
    last = model_registry.history(Store(service.store), "asked")[-1]
    assert (last.version, last.what, last.by, last.why) == (1, "promoted", "Ada", "reads well")
    events("asked", "registered", "promoted")


def test_a_person_says_no(service: Service) -> None:
    model, run = "refused", start(service, "refused", "promotion.when=approval")
    assert wait(run, "Suspended", "Completed", "Failed").state_name == "Suspended"
    answer(run, approve="no", name="Ada", comment="")
    done = wait(run, "Completed", "Failed", "Crashed")
    assert done.state and done.state.message == f"all stages are whole; {model}@1 is a rejected version"
    assert (in_use(service, model), status(service, f"{model}@1")) == (None, "rejected")
    assert events(model, "registered", "rejected")[-1]["payload"]["by"] == "Ada"


def test_what_does_not_pass_the_gate_is_rejected(service: Service) -> None:
    run = start(service, "worse", "promotion.when=gate", "eval.gate=[{dataset: chats, beat_by: 1000000}]")
    done = wait(run, "Completed", "Failed", "Crashed")
    assert done.state and done.state.name == "Failed"
    assert "does not pass the gate" in (done.state.message or "")
    assert (in_use(service, "worse"), status(service, "worse@1")) == (None, "rejected")
    assert events("worse", "registered", "rejected")[-1]["payload"]["faults"]
