"""A recipe's weeks on a real server: trained, nothing new, a new file that is found, learned and put into production, a bad file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun

from flows.new_data import new_data
from flows.service import Service
from pipelines import model_registry
from pipelines.artifacts import Store
from pipelines.recipe import PROJECT
from tests.service.conftest import TINY

SECONDS = 500
CHATS = PROJECT / "data" / "openai_chats"
CHANGES = {"name": "weeks", "retrain": {"start": "production", "replay": 0.25}, "promotion": {"when": "gate"}}


def recipe_in(folder: Path) -> str:
    """tiny.yaml as a recipe that goes on; its data, at first the same, lies in the folder `data` beside it."""
    (folder / "data").mkdir()
    shutil.copyfile(CHATS / "train.jsonl", folder / "data" / "train.jsonl")
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    gate = [{"dataset": "chats", "lose_at_most": 100}, {"dataset": "chats", "against": "production", "lose_at_most": 100}]
    tree["data"]["train"] = [str(folder / "data")]
    tree["eval"] |= {"production": "registry", "gate": gate}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**tree, **CHANGES}), encoding="utf-8")
    return str(folder / "recipe.yaml")


def start(deployment: str, **parameters: Any) -> UUID:
    with get_client(sync_client=True) as client:
        deployed = client.read_deployment_by_name(deployment)
        return client.create_flow_run_from_deployment(deployed.id, parameters=parameters).id


def ended(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return until(lambda: (found := client.read_flow_run(run)).state and found.state.is_final() and found)


def until(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def message(run: FlowRun) -> str:
    return (run.state and run.state.message) or ""


def logged(run: FlowRun) -> list[str]:
    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
    with get_client(sync_client=True) as client:
        return [log.message for log in client.read_logs(wanted, limit=200)]


def started_by_new_data() -> list[FlowRun]:
    """The oldest first."""
    wanted = FlowRunFilter.model_validate({"tags": {"all_": ["trigger:new-data", "recipe:weeks"]}})
    with get_client(sync_client=True) as client:
        return sorted(client.read_flow_runs(flow_run_filter=wanted), key=lambda run: str(run.created))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three runs, one after another
def test_weeks(service: Service, tmp_path: Path) -> None:
    recipe, store = recipe_in(tmp_path), Store(service.store)
    place = {"recipe": recipe, "store": str(service.store)}

    def look(settle_seconds: float = 0) -> str:
        return new_data(recipe=recipe, store=service.store, settle_seconds=settle_seconds, return_state=True).message or ""

    assert look().startswith("no version of weeks was made by weeks yet; start its first training by hand")

    first = ended(start("finetune-flow/finetune-flow", **place))
    assert message(first) == "all stages are whole; weeks@1 is in production"
    until(lambda: "training begins at the base model: no version of weeks is in production yet" in logged(first))

    again = ended(start("finetune-flow/weekly", **place, trigger="schedule"))
    assert again.state_name == "Completed"
    assert message(again).startswith(
        f"no new data: weeks@1 ({model_registry.find(store, 'weeks@1').created}) was trained on what the files"
    )
    until(lambda: message(again) in logged(again))  # lines reach the server a little after the state
    assert again.total_run_time.total_seconds() < first.total_run_time.total_seconds() / 3
    assert look() == "no new data: weeks@1 was trained on what the files of data.train hold"

    shutil.copyfile(CHATS / "heldout.jsonl", tmp_path / "data" / "week-2.jsonl")
    assert look(3600).startswith("still changing, or changed in the last 3600 s: train.jsonl, week-2.jsonl")
    assert look().startswith("new files since weeks@1: week-2.jsonl; started ")
    second = ended(until(started_by_new_data)[0].id)
    assert message(second) == "all stages are whole; weeks@2 is in production"
    until(lambda: any(line.startswith("all stages are whole") or "Finished in state" in line for line in logged(second)))
    told = logged(second)
    assert "training begins with the weights of weeks@1" in told
    assert f"new since weeks@1: file {tmp_path / 'data' / 'week-2.jsonl'}" in told
    assert any("tokenized 1 of 2 input files" in line for line in told)
    version = model_registry.find(store, "weeks@2")
    assert [Path(file["path"]).name for file in version.data] == ["train.jsonl", "week-2.jsonl"]
    sources = model_registry.artifact(store, version, "prepare").metrics["sources"]
    assert {Path(one["file"]).name: one["sample_ratio"] for one in sources} == {"train.jsonl": 0.25, "week-2.jsonl": 1.0}
    assert look() == "no new data: weeks@2 was trained on what the files of data.train hold"

    (tmp_path / "data" / "week-3.jsonl").write_text(json.dumps({"messages": "broken"}) + "\n", encoding="utf-8")
    assert "week-3.jsonl; started" in look()
    third = ended(until(lambda: started_by_new_data()[1:])[0].id)
    assert third.state_name == "Failed" and "week-3.jsonl" in message(third)
    assert f"week-3.jsonl; a run was started for them already, {third.name}: Failed" in look()
    assert len(started_by_new_data()) == 2
