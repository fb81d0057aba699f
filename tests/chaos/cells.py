"""One cell of the kill matrix: who is killed, in which stage, and what became of it.

A cell begins with a copy of a store in which all is made, less the stage and what follows from it. The names of what is missing are known
(they are hashes of what decides the bytes), so the moment is found without guessing: the stage's folder appears in the store's `.work`.
Then the run is frozen (SIGSTOP), looked at again, and the victim killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun

from flows.service import Service, up
from pipelines.artifacts import Store
from pipelines.pipeline import nodes
from pipelines.recipe import load_recipe
from pipelines.runner import run_node
from xtuner_core.checkpoint.store import published, step_of
from xtuner_core.durable import remove

RECIPE = Path(__file__).with_name("recipe.yaml")
NODES = [node.name for node in nodes(load_recipe(str(RECIPE)))]
PATIENCE = 400
"""Seconds for anything that happens within one on a quiet machine."""
AUTOMATIC = 120
"""Seconds for the rule that makes a crashed run go on; it acts at once."""
Stage = Literal["prepare", "train", "convert", "eval", "chat"]
Victim = Literal["rank", "launcher", "program", "supervisor", "flow", "worker", "server"]
CELLS: tuple[tuple[Stage, Victim], ...] = (
    *(("prepare", victim) for victim in ("flow", "worker", "server")),
    *(("train", victim) for victim in ("rank", "launcher", "supervisor", "flow", "worker", "server")),
    *(("convert", victim) for victim in ("flow", "worker", "server")),
    *(("eval", victim) for victim in ("program", "supervisor", "flow", "worker", "server")),
    *(("chat", victim) for victim in ("program", "supervisor", "flow", "worker", "server")),
)
"""`program`: what the supervisor of a stage other than training runs. Where a stage has no such process, there is no cell."""
SHORT: tuple[tuple[Stage, Victim], ...] = (("train", "flow"), ("train", "worker"), ("eval", "server"))
"""For every day; a killed rank and launcher are also in tests/faults/test_training.py."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended; `seconds` from the kill to the end of the run that finished the work."""

    stage: Stage
    victim: Victim
    killed_at_step: int
    """Newest checkpoint at the kill; 0 if none was there or needed."""
    resumed_from: tuple[int, ...]
    """Steps at which later trainings began."""
    by: Literal["the same process", "the same run, again", "the next run"]
    states: dict[str, str]
    """Task → the last state of it in the run that finished the work."""
    left: tuple[str, ...]
    """Processes that were still there."""
    unfinished: tuple[str, ...]
    """Runs in no final state."""
    weights: dict[str, str]
    seconds: float


def make_all(store: Store) -> dict[str, Path]:
    """Every node's artifact, made without anybody's disturbing it."""
    recipe = load_recipe(str(RECIPE))
    made: dict[str, Any] = {}
    for node in nodes(recipe):
        made[node.name] = run_node(node, recipe, store, made, print).artifact
    return {name: artifact.path for name, artifact in made.items()}


def weights(artifact: Path) -> dict[str, str]:
    """File → sha256 of the merged model's weights, each read again."""
    found = Store(artifact.parents[1]).find(artifact.parent.name, artifact.name, full=True)
    assert found, artifact
    return {entry["path"]: entry["sha256"] for entry in found.manifest["files"] if entry["path"].endswith(".safetensors")}


def run_cell(stage: Stage, victim: Victim, service: Service, made: dict[str, Path], folder: Path) -> Outcome:
    """Kill `victim` in `stage` and bring the service up again; made: node → the artifact in the store of an undisturbed run."""
    store = without(stage, made, folder / "store")
    attempt = store / ".work" / f"{made[stage].parent.name}-{made[stage].name}"
    with get_client(sync_client=True) as client:
        service = up(service.home, service.store, service.recipe)  # as it is now: other cells killed parts of it
        first = start(client, store)
        run = freeze_when(lambda: is_at(stage, attempt, first))
        step = newest_step(attempt)
        before = [*run.below, run.flow]
        os.kill(run.pid(victim, service), signal.SIGKILL)
        killed = time.monotonic()
        send(before, signal.SIGCONT)
        if victim in ("worker", "server"):
            up(service.home, service.store, service.recipe)
        last = settled(client, first)
        seconds = round(time.monotonic() - killed, 1)
        by = "the next run" if last.id != first else "the same process" if last.run_count == 1 else "the same run, again"
        began = resumed(in_store(store, made["train"]) / "record" / "train.log") if stage == "train" else ()
        tasks, left = task_states(client, last.id), left_over(before, first, last.id)
        return Outcome(stage, victim, step, began, by, tasks, left, unfinished(client), weights(in_store(store, made["convert"])), seconds)


def in_store(store: Path, artifact: Path) -> Path:
    """The same artifact in another store."""
    return store / artifact.parent.name / artifact.name


def without(stage: Stage, made: dict[str, Path], store: Path) -> Path:
    """A copy of the store that lacks the artifact of the stage and, before the model is made, those up to it."""
    shutil.copytree(made["base"].parents[1], store)
    missing = [stage] if stage in ("convert", "eval", "chat") else NODES[NODES.index(stage) : NODES.index("convert") + 1]
    for name in missing:
        remove(in_store(store, made[name]))
    remove(store / "shards")
    return store


def start(client: SyncPrefectClient, store: Path) -> UUID:
    """As `prefect deployment run finetune-flow` does."""
    deployed = client.read_deployment_by_name("finetune-flow/finetune-flow")
    return client.create_flow_run_from_deployment(deployed.id, parameters={"recipe": str(RECIPE), "store": str(store)}).id


# The moment ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """A run's processes."""

    flow: psutil.Process
    below: tuple[psutil.Process, ...]

    def pid(self, victim: Victim, service: Service) -> int:
        """Of the process that is to be killed."""
        if victim in ("worker", "server"):
            return service.pids[victim]
        return self.flow.pid if victim == "flow" else next(one.pid for one in self.below if kind(one) == victim)


def kind(process: psutil.Process) -> str:
    """What a process below a flow is."""
    words = " ".join(process.cmdline())
    if "supervisor.py" in words:
        return "supervisor"
    if "torch.distributed.run" in words:
        return "launcher"
    return "rank" if "xtuner_core.sft" in words else "program"


def is_at(stage: Stage, attempt: Path, run: UUID) -> Running | None:
    """The run's processes, if it is in the middle of the stage."""
    if not attempt.exists() or (stage == "train" and (not newest_step(attempt) or (attempt / "scratch" / "final").exists())):
        return None
    flow = next((one for one in of_run(run) if "prefect.engine" in words(one)), None)
    if flow is None:
        return None
    with suppress(psutil.Error):
        below = tuple(flow.children(recursive=True))
        needed = {"train": {"supervisor", "launcher", "rank"}, "eval": {"supervisor", "program"}, "chat": {"supervisor", "program"}}
        if needed.get(stage, set()) <= {kind(one) for one in below}:
            return Running(flow, below)
    return None


def freeze_when(look: Callable[[], Running | None]) -> Running:
    """Wait for the moment and hold the run there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if run := look():
            send([run.flow, *run.below], signal.SIGSTOP)
            if found := look():
                send(found.below, signal.SIGSTOP)
                return found
            send([run.flow, *run.below], signal.SIGCONT)
        time.sleep(0.002)
    raise AssertionError("the stage was never seen at work")


def newest_step(attempt: Path) -> int:
    """Of the checkpoints that are published."""
    saved = published(attempt / "scratch")
    return step_of(saved[-1]) if saved else 0


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


# What became of it -----------------------------------------------------------------------------------------------------------------


def settled(client: SyncPrefectClient, run: UUID) -> FlowRun:
    """The run, or the one that was started after it had failed, once it is completed."""
    first = until_final(client, run)
    if first.state and not first.state.is_completed():
        first = until_final(client, start(client, Path(first.parameters["store"])))
    assert first.state and first.state.is_completed(), first.state
    return first


def until_final(client: SyncPrefectClient, run: UUID) -> FlowRun:
    """Wait for the end, and if that is a crash, for the rule that makes it go on."""
    deadline, crashed = time.monotonic() + PATIENCE, None
    while time.monotonic() < deadline:
        found = client.read_flow_run(run)
        if found.state and found.state.is_final():
            crashed = crashed or time.monotonic()
            if not found.state.is_crashed() or time.monotonic() > crashed + AUTOMATIC:
                return found
        else:
            crashed = None
        time.sleep(0.2)
    raise AssertionError(f"the run is {found.state_name} for ever: {found.state and found.state.message}")


def unfinished(client: SyncPrefectClient) -> tuple[str, ...]:
    """Runs of the pipeline that are not at their end; those of its schedule, which wait for their hour, do not count."""
    runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["finetune-flow"])))
    return tuple(f"{run.name}: {run.state_name}" for run in runs if run.start_time and not (run.state and run.state.is_final()))


def task_states(client: SyncPrefectClient, run: UUID) -> dict[str, str]:
    """Task → the name of its last state, once all are told (they reach the server as events, a moment later)."""
    deadline = time.monotonic() + 30
    unsettled = {"Running", "Pending"}
    while True:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        last = {
            task.name: task.state_name or "" for task in sorted(tasks, key=lambda task: str(task.start_time or task.expected_start_time))
        }
        if time.monotonic() > deadline or (set(NODES) <= last.keys() and not unsettled & set(last.values())):
            return last
        time.sleep(0.2)


def resumed(log: Path) -> tuple[int, ...]:
    """Steps at which trainings began that found a checkpoint."""
    marks = [
        line.partition("resumed from step-")[2] for line in log.read_text(encoding="utf-8").splitlines() if "resumed from step-" in line
    ]
    return tuple(int("".join(character for character in mark.split()[0] if character.isdigit())) for mark in marks)


def left_over(before: Iterable[psutil.Process], *runs: UUID) -> tuple[str, ...]:
    """Processes of the run that was disturbed, and all that carry the name of one of the runs, after a moment for the last ones to go."""
    deadline = time.monotonic() + 60
    while True:
        alive = [process for process in before if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        found = {process.pid: " ".join(words(process))[:200] for process in (*alive, *(one for run in runs for one in of_run(run)))}
        if not found or time.monotonic() > deadline:
            return tuple(found.values())
        time.sleep(0.2)


def of_run(run: UUID) -> list[psutil.Process]:
    """What the worker started for a run, and what that started: Prefect names the run in the environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("PREFECT__FLOW_RUN_ID") == str(run):
                found.append(process)
    return found


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
