"""The whole flow on the tiny recipe under a real Prefect server: real torchrun, real OpenCompass, a real chat server, one store.

OpenCompass runs twice here, for the base and the tuned model; every later run of this file finds both in the store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from pipelines import chatters
from pipelines.artifacts import Artifact, Store
from pipelines.pipeline import STAGES, nodes
from pipelines.recipe import PROJECT, load_recipe
from xtuner_core.errors import DataError

pytestmark = pytest.mark.slow

TINY = "qwen3_tiny_full_openai"
SHORT = ["train.total_step=6", "eval.limit=4"]
NODES = [node.name for node in nodes(load_recipe(TINY))]
RUN_FIELDS = {"recipe", "stages", "support", "scores", "differences", "gate", "chat", "ok"}
STAGE_FIELDS = {"name", "key", "state", "seconds", "artifact"}

INTERRUPTED = """
import os, signal, time
from contextlib import contextmanager

def unavailable():
    return None

@contextmanager
def serve(request, log_file, log):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
    yield None
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A flow run as the Prefect server knows it."""

    state: Any
    tasks: dict[str, Any]
    """Task's name → its state."""

    @property
    def names(self) -> dict[str, str]:
        return {name: state.name for name, state in self.tasks.items()}

    @property
    def summary(self) -> dict[str, Any]:
        outcome = self.state.result(raise_on_failure=False)
        return getattr(outcome, "told", outcome)[0]


def run_flow(store: Store, *overrides: str, recheck: bool = False) -> Run:
    from flows.finetune import finetune_flow

    recipe = load_recipe(TINY, [*SHORT, *overrides])
    return _as_recorded(finetune_flow(recipe, store=store.root, recheck=recheck, return_state=True), len(nodes(recipe)))


def _as_recorded(state: Any, count: int) -> Run:
    """Task states reach the server a moment later, as events: waits for the last of `count`, and a little for one too many."""
    deadline = time.monotonic() + 60
    while True:
        tasks = _tasks(state.state_details.flow_run_id)
        if len(tasks) >= count and all(task is not None and task.is_final() for task in tasks.values()):
            time.sleep(0.3)
            return Run(state, _tasks(state.state_details.flow_run_id))
        assert time.monotonic() < deadline, tasks
        time.sleep(0.1)


def _tasks(flow_run: UUID) -> dict[str, Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
    return {task.name: task.state for task in found}


def latest_run(count: int) -> Run:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    return _as_recorded(run.state, count)


def report() -> str:
    from prefect.artifacts import Artifact as Shown

    from flows.reporting.board import slug

    shown = Shown.get(key=f"{slug(TINY)}-report")
    assert shown
    return str(shown.data)


def whole(store: Store) -> dict[str, str]:
    """Every artifact's digest, each file hashed again."""
    found = [store.find(folder.parent.name, folder.name, full=True) for folder in store.folders()]
    return {str(artifact.path): artifact.digest for artifact in found if artifact}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("flow") / "store")


@pytest.fixture(scope="module")
def first(prefect_server: None, store: Store) -> Run:
    return run_flow(store)


def stage(run: Run, name: str) -> Artifact:
    listed = [*run.summary["stages"], *run.summary["support"]]
    return Artifact(Path(next(entry["artifact"] for entry in listed if entry["name"] == name)))


def test_the_first_run_makes_every_stage(first: Run, store: Store) -> None:
    assert first.names == dict.fromkeys(NODES, "Completed")
    assert (first.state.type.value, first.state.message) == (
        "COMPLETED",
        f"all stages are whole; {TINY}@1 is a candidate version: xtuner promote {TINY}@1 --why ...",
    )
    assert [entry["state"] for entry in first.summary["stages"]] == ["ran"] * 5
    assert len(whole(store)) == len(NODES)
    assert all(str(store.root) in state.message for state in first.tasks.values())
    assert stage(first, "train").metrics["steps"] == 6
    assert stage(first, "train").metrics["last_loss"] < stage(first, "train").metrics["first_loss"]


def test_the_report_has_table_picture_and_answers(first: Run) -> None:
    page = report()
    assert page.startswith(f"# {TINY}\n")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["| stage", *(f"| {name}" for name in STAGES), "| data set", "| chats"]
    assert "\n## Verdict\n\nThe gate is open: the recipe demands nothing" in page
    assert "![training loss](data:image/png;base64,iVBOR" in page
    assert page.count("\n- **") == stage(first, "chat").metrics["total"] == 2
    assert str(stage(first, "convert").payload / "model") in page


def test_scores_are_opencompass_s_of_both_models(first: Run) -> None:
    for role, name in (("base", "eval-base"), ("tuned", "eval")):
        scores = json.loads((stage(first, name).payload / "scores.json").read_text())["datasets"]["chats"]
        assert len(scores["samples"]) == 4
        assert first.summary["scores"][role] == {"chats": scores["value"]}
    assert first.summary["differences"]["chats"]["base"]["low"] <= first.summary["differences"]["chats"]["base"]["high"]
    assert stage(first, "verdict").metrics["gate"] == first.summary["gate"] == {"passed": True, "rules": []}


def test_the_second_run_shows_cached_and_writes_nothing(first: Run, store: Store) -> None:
    before = whole(store)
    again = run_flow(store)
    assert again.names == dict.fromkeys(NODES, "Cached")
    assert all("whole in the store" in state.message for state in again.tasks.values())
    assert [entry["state"] for entry in again.summary["stages"]] == ["cached"] * 5
    assert again.summary["scores"] == first.summary["scores"]
    assert whole(store) == before


def test_exactly_what_is_damaged_is_rebuilt(first: Run, store: Store) -> None:
    before = whole(store)
    (stage(first, "prepare").payload / "samples.jsonl").unlink()
    convert = stage(first, "convert")
    weights = convert.payload / "model" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stamp, stamp))
    assert store.find("convert", convert.path.name), "as if the disk had rotted: size and time stamp tell nothing"
    again = run_flow(store, recheck=True)
    assert again.names == {name: "Completed" if name in ("prepare", "convert") else "Cached" for name in NODES}
    assert whole(store) == before
    assert not list((store.root / ".damaged").iterdir())


def test_bad_data_fails_the_flow_in_words_and_keeps_what_was_made(first: Run, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.finetune import run as program

    before = whole(store)
    code = program(TINY, overrides=[*SHORT, "data.train=data/hostile/broken_json.jsonl"], store=store.root)
    failed = latest_run(2)
    assert code == 65
    assert failed.names == {"base": "Cached", "prepare": "Failed"}
    assert (failed.state.type.value, failed.state.message) == ("FAILED", failed.tasks["prepare"].message)
    assert "data/hostile/broken_json.jsonl:" in failed.state.message
    assert "data.max_rejected" in failed.state.message
    told = capsys.readouterr()
    assert f"error: {failed.state.message}\n" in told.err
    assert "Traceback" not in told.err + told.out + failed.state.message
    assert whole(store) == before


def test_a_failed_chat_test_fails_the_flow_but_keeps_the_model(first: Run, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import main

    strict = run_flow(store, "chat.min_correct=1.0")
    assert strict.names == {name: "Completed" if name == "chat" else "Cached" for name in NODES}
    assert strict.state.type.value == "FAILED"
    assert "the model was made, but the chat test failed: 0 of 2 answers are right" in strict.state.message
    assert strict.summary["ok"] is False
    assert whole(store).keys() >= {str(stage(first, "convert").path)}
    assert "✗ expected" in report()
    overrides = [word for override in (*SHORT, "chat.min_correct=1.0") for word in ("--set", override)]
    assert main(["chat", TINY, *overrides, "--store", str(store.root)]) == 65
    assert "error: the chat test failed: 0 of 2 answers are right" in capsys.readouterr().err


def test_a_gate_that_is_not_passed_fails_the_flow_but_keeps_the_model(first: Run, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is also the model in use here, so that its evaluation is there already."""
    from flows.finetune import run as program

    before = whole(store)
    rules = "[{dataset: chats, lose_at_most: 100}, {dataset: chats, against: production, beat_by: 100}]"
    gated = [f"eval.production={stage(first, 'base').payload / 'model'}", f"eval.gate={rules}"]
    code = program(TINY, overrides=[*SHORT, *gated], store=store.root)
    strict = latest_run(len(NODES) + 2)
    assert code == 65
    assert strict.names == {
        **dict.fromkeys(NODES, "Cached"),
        **dict.fromkeys(("production", "verdict"), "Completed"),
        "eval-production": "Cached",
    }
    assert strict.state.type.value == "FAILED"
    assert strict.state.message.startswith("the model was made, but it does not pass the gate: chats: ")
    assert strict.state.message.endswith("at least 100.0 points better demanded: does not hold.")
    told = capsys.readouterr()
    assert f"error: {strict.state.message}\n" in told.err
    assert "Traceback" not in told.err + told.out
    after = whole(store)
    assert after.items() >= before.items() and len(after) == len(before) + 2
    assert "**The gate is not passed.**" in report()


def test_eval_prints_the_verdict_and_fails_if_the_gate_is_not_passed(first: Run, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import evaluate

    evaluate(TINY, overrides=SHORT, store=store.root)
    assert "# Verdict\n\nThe gate is open: the recipe demands nothing" in capsys.readouterr().out
    with pytest.raises(DataError, match="does not pass the gate"):
        evaluate(TINY, overrides=[*SHORT, "eval.gate=[{dataset: chats, beat_by: 100}]"], store=store.root)
    assert "✗ chats: " in capsys.readouterr().out


def test_control_c_in_a_stage_ends_with_the_code_that_says_run_again(
    first: Run, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.finetune import run as program

    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    monkeypatch.setattr(chatters, "__path__", [*chatters.__path__, str(tmp_path)])
    before = whole(store)
    assert program(TINY, overrides=[*SHORT, "chat.chatter=interrupted"], store=store.root) == 75
    told = capsys.readouterr()
    assert "error: interrupted in chat; finished stages are kept, run the same command again to continue.\n" in told.err
    assert "Traceback" not in told.err + told.out
    assert whole(store) == before


def test_the_command_as_a_user_types_it(first: Run, store: Store, tmp_path: Path) -> None:
    settings = [part for override in SHORT for part in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        TINY,
        *settings,
        "--store",
        str(store.root),
        "--json",
        str(tmp_path / "out.json"),
    ]
    env = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.keys() == RUN_FIELDS
    assert all(entry.keys() == STAGE_FIELDS for entry in [*written["stages"], *written["support"]])
    assert [(entry["name"], entry["state"]) for entry in written["stages"]] == [(name, "cached") for name in STAGES]
    assert all(Path(entry["artifact"]).name == entry["key"] for entry in written["stages"])
    assert written["differences"] == first.summary["differences"] and written["gate"] == first.summary["gate"]
    assert (written["recipe"], written["ok"], written["scores"]) == (TINY, True, first.summary["scores"])
    assert (written["chat"]["passed"], written["chat"]["total"], written["chat"]["why"]) == (first.summary["chat"]["passed"], 2, [])
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == [["| stage", "state"], *([f"| {name}", "cached"] for name in STAGES)]
    assert f"Talk to it: xtuner chat {stage(first, 'convert').payload / 'model'}\n" in done.stdout
