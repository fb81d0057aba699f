"""A run under a real server and worker: cancelled with two ranks it keeps a checkpoint; what it shows; what is refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling

from flows.service import Service
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from pipelines.runner import run_until

pytestmark = pytest.mark.slow

STEPS = 80
LONG = (f"train.total_step={STEPS}", "train.processes=2")
TINY = Path(__file__).parent / "tiny.yaml"
NAME = "finetune-flow/finetune-flow"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A run that was cancelled while two ranks trained, as the server shows it a while later."""

    run: Any
    attempt: Path
    steps: int
    """That its training had done."""
    seconds: float
    """From the request until it was over."""
    left: list[str]
    """Command lines of processes that still were there then."""
    tasks: dict[str, Any]
    logs: list[Any]
    artifacts: list[Any]


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return found


def trainers(store: Path) -> list[str]:
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [" ".join(words) for words in lines if "xtuner_core.sft" in words and any(str(store) in word for word in words)]


def attempts(store: Path) -> set[Path]:
    """Of trainings that were not finished."""
    return set((store / ".work").glob("train-*"))


def steps_done(attempt: Path) -> int:
    log = attempt / "record" / "train.log"
    return log.read_text().count("[INFO] Step ") if log.exists() else 0


@pytest.fixture(scope="module")
def cancelled(service: Service) -> Cancelled:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: service.api}), get_client(sync_client=True) as client:
        before = attempts(service.store)
        started: Any = run_deployment(NAME, parameters={"changes": list(LONG)}, timeout=0)
        (attempt,) = wait_for(lambda: [one for one in attempts(service.store) - before if steps_done(one) >= 3])
        asked = time.monotonic()
        client.set_flow_run_state(started.id, Cancelling())
        wait_for(lambda: (state := client.read_flow_run(started.id).state) and state.is_final())
        seconds, left = time.monotonic() - asked, trainers(service.store)
        one = FlowRunFilter(id=FlowRunFilterId(any_=[started.id]))
        wait_for(lambda: all(task.state and task.state.is_final() for task in client.read_task_runs(flow_run_filter=one)))
        logs = wait_for(lambda: _whole_log(client, started.id))
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[started.id])))
        tasks = {task.name: task.state for task in sorted(client.read_task_runs(flow_run_filter=one), key=lambda task: task.name)}
        return Cancelled(client.read_flow_run(started.id), attempt, steps_done(attempt), seconds, left, tasks, logs, shown)


def _whole_log(client: Any, run: UUID) -> list[Any]:
    """Lines come a moment later; of the last ones is what the ranks said at their end."""
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
    return logs if any(log.message.startswith("stopped after step") for log in logs) else []


def test_a_cancelled_training_leaves_a_checkpoint_and_no_process(cancelled: Cancelled) -> None:
    assert (cancelled.run.state.name, cancelled.left) == ("Cancelled", [])
    assert cancelled.seconds < 150  # 60 where the machine is not shared
    ended = {name: state.name for name, state in cancelled.tasks.items()}
    assert (list(ended), ended["train"]) == (["base", "prepare", "train"], "Cancelled")
    assert (cancelled.attempt / "scratch" / "checkpoints" / f"step-{cancelled.steps}").is_dir()


def test_it_is_named_and_tagged(cancelled: Cancelled) -> None:
    assert cancelled.run.name.startswith("tiny · hand · 20")
    assert {"recipe:tiny_service", "model:tiny_service", "trigger:hand"} <= set(cancelled.run.tags)


def test_it_showed_how_far_it_was(cancelled: Cancelled) -> None:
    (shown,) = [artifact for artifact in cancelled.artifacts if artifact.type == "progress"]
    assert shown.description.startswith("train: step ") and f" of {STEPS}, loss " in shown.description
    assert 0 < shown.data < 100


def test_its_log_has_some_steps_and_levels(cancelled: Cancelled) -> None:
    by_message = {log.message: log.level for log in cancelled.logs}
    steps = [message for message in by_message if message.startswith("Step ")]
    assert steps[0].startswith(f"Step 1/{STEPS} ")
    assert len(steps) < cancelled.steps
    assert any(message.startswith("the whole log: ") and message.count("train.log") for message in by_message)
    (received,) = [level for message, level in by_message.items() if "death signal" in message]
    assert received == logging.WARNING
    assert any(message.startswith("saved checkpoint step-") for message in by_message)


def test_the_next_run_goes_on_from_the_checkpoint(cancelled: Cancelled, service: Service) -> None:
    lines: list[str] = []
    trained = run_until("train", load_recipe(str(TINY), LONG), Store(service.store), lines.append)
    assert f"[train] resumed from step-{cancelled.steps}" in lines
    assert trained.artifact.metrics["steps"] == STEPS


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"recipe": {"name": "x", "bogus": 1}}, "recipe"),
        ({"trigger": "whim"}, "'whim' is not one of"),
        ({"changes": "train.lr=1"}, "is not of type 'array'"),
    ],
)
def test_the_server_refuses(parameters: dict[str, Any], reason: str, service: Service) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(NAME)
        with pytest.raises(PrefectHTTPStatusError) as refused:
            client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    assert reason in refused.value.response.text


def test_a_name_nobody_knows_and_a_time_that_is_over_end_the_run_in_words(service: Service) -> None:
    from flows.finetune import finetune_flow

    unknown = finetune_flow("nope", store=service.store, return_state=True)
    assert unknown.name == "Failed"
    assert all(word in str(unknown.message) for word in ("nope", "qwen3_tiny_full_openai"))
    late = finetune_flow(str(TINY), ("timeout_hours=1e-9", "seed=7"), service.store, return_state=True)
    assert (late.type.value, late.name) == ("FAILED", "TimedOut")
    assert str(late.message).startswith("timeout_hours: 1e-09 h were over in ")
