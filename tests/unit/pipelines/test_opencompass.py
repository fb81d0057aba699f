"""The OpenCompass evaluator without OpenCompass: what goes in, what is believed of what comes out, and its cage."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluators import opencompass
from pipelines.heldout import HeldOut
from pipelines.recipe import EvalDataset
from xtuner_core.errors import DataError

USER, ANSWER = {"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "shipping"}
SAMPLES = [
    HeldOut(({"role": "user", "content": "A long question, asked second."},), "billing", 1),
    HeldOut(({"role": "user", "content": "A short one."},), "shipping", 2),
]


def _dataset(folder: Path, *rows: Any) -> EvalDataset:
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return EvalDataset(name="tickets", path=str(path), max_out_len=16)


def test_a_system_message_stands_before_every_question_or_before_none(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = tmp_path / "heldout.jsonl"
    dataset = EvalDataset.model_validate({"name": "tickets", "path": str(path)})

    path.write_text(json.dumps([system, USER, ANSWER]) + "\n")
    (sample,) = opencompass.questions(dataset, None)
    opencompass.write_questions(tmp_path / "questions.jsonl", [sample])
    assert json.loads((tmp_path / "questions.jsonl").read_text()) == {
        opencompass.SYSTEM: "Be brief.",
        opencompass.QUESTION: USER["content"],
        opencompass.ANSWER: ANSWER["content"],
    }

    path.write_text(json.dumps([system, USER, ANSWER]) + "\n" + json.dumps([USER, ANSWER]) + "\n")
    with pytest.raises(DataError, match=r"heldout\.jsonl:2: either all conversations"):
        opencompass.questions(dataset, None)


@pytest.mark.parametrize(
    "row",
    [
        [USER, ANSWER, USER, ANSWER],
        [{"role": "user", "content": ""}, ANSWER],
    ],
)
def test_only_one_question_and_one_answer_can_be_judged(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"heldout\.jsonl:2: .*one user message"):
        opencompass.questions(_dataset(tmp_path, [USER, ANSWER], row), None)


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    taken = opencompass.questions(_dataset(tmp_path, [USER, ANSWER], [USER, ANSWER], [USER, ANSWER]), 2)
    assert [sample.line for sample in taken] == [1, 2]


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json: .*Hugging Face"):
        opencompass.context_length(tmp_path)


def test_no_code_of_the_model_folder_may_run(tmp_path: Path) -> None:
    datasets = [EvalDataset(name="tickets", path="x")]
    (model,) = opencompass.experiment(tmp_path, datasets, 16, tmp_path, 128)["models"]
    assert model["model_kwargs"]["trust_remote_code"] is False
    assert model["tokenizer_kwargs"]["trust_remote_code"] is False
    assert model["max_seq_len"] == 128  # if it were None, OpenCompass would read it with remote code allowed


def _prediction(question: str, gold: str, answer: str) -> dict[str, Any]:
    return {"origin_prompt": [{"role": "HUMAN", "prompt": question}], "prediction": answer, "gold": gold}


def _outputs(work: Path, predictions: list[dict[str, Any]], results: Any) -> None:
    """What a run leaves, in the order of the questions' length."""
    run = work / "out" / "20260101_000000"
    for kind, content in (("predictions", dict(enumerate(predictions))), ("results", results)):
        folder = run / kind / opencompass.MODEL
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "tickets.json").write_text(json.dumps(content))
    (work / "opencompass.log").write_text("RuntimeError: the reason\n")


RIGHT = [_prediction("A short one.", "shipping", "shipping"), _prediction("A long question, asked second.", "billing", "billing.")]


def test_samples_come_back_in_the_order_of_the_file(tmp_path: Path) -> None:
    _outputs(tmp_path, RIGHT, {"accuracy": 50.0})
    score = opencompass.read_score(tmp_path, "tickets", SAMPLES)
    assert [(sample.expected, sample.answer, sample.correct) for sample in score.samples] == [
        ("billing", "billing.", False),
        ("shipping", "shipping", True),
    ]
    assert (score.metric, score.value) == ("accuracy", 50.0)


@pytest.mark.parametrize(
    ("predictions", "results", "reason"),
    [
        (RIGHT, None, "left no results for tickets"),
        (RIGHT[:1], {"accuracy": 100.0}, "answered 1 of the 2 questions"),
        (RIGHT, {"error": "different length"}, "reports accuracy None"),
        (RIGHT, {"accuracy": "-"}, "reports accuracy '-'"),
        (RIGHT, {"accuracy": 100.0}, "reports accuracy 100.0 for tickets, but its answers have 50.0"),
        ([_prediction("A short one.\n", "shipping", "shipping"), RIGHT[1]], {"accuracy": 50.0}, "changed the sample of line 2"),
        ([RIGHT[0], RIGHT[1] | {"gold": "refund"}], {"accuracy": 50.0}, "changed the sample of line 1"),
    ],
)
def test_what_was_not_asked_or_does_not_add_up_is_not_believed(tmp_path: Path, predictions: Any, results: Any, reason: str) -> None:
    _outputs(tmp_path, predictions, results)
    with pytest.raises(DataError) as caught:
        opencompass.read_score(tmp_path, "tickets", SAMPLES)
    assert reason in str(caught.value)
    assert "RuntimeError: the reason" in str(caught.value)


def test_a_run_that_left_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="left no predictions for tickets"):
        opencompass.read_score(tmp_path, "tickets", SAMPLES)


def test_the_child_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    env = opencompass.clean_environment(tmp_path)
    assert not {"HF_TOKEN", "PYTHONPATH"} & set(env)
    assert env["HOME"] == str(tmp_path)


needs_cage = pytest.mark.skipif(not opencompass.network_cage(), reason="this kernel or container has no `unshare --net` for users")


@needs_cage
def test_the_cage_has_no_network_not_even_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert subprocess.run([sys.executable, "-c", connect], capture_output=True, check=False).returncode == 0
        caged = subprocess.run([*opencompass.network_cage(), sys.executable, "-c", connect], capture_output=True, text=True, check=False)
    assert "Network is unreachable" in caged.stderr


@needs_cage
def test_what_runs_in_the_cage_dies_with_a_killed_parent(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from pipelines.evaluators.opencompass import network_cage
        from pipelines.processes import child
        write = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        with child([*network_cage(), sys.executable, "-c", write], Path(sys.argv[1]), os.environ, grace=1):
            time.sleep(600)
    """)
    output = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, str(output)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        _wait_until(lambda: output.is_file() and output.read_text().strip() != "")
        caged = int(output.read_text())
        assert Path(f"/proc/{caged}").exists()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait_until(lambda: not _runs(caged))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
