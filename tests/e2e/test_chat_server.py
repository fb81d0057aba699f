"""A real server answers for a tiny model that learned two answers: stage chat, and what goes wrong with servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines import chat
from pipelines.chatters import Request
from pipelines.chatters.transformers import serve
from pipelines.client import ask, client
from pipelines.recipe import load_recipe
from pipelines.stage import Metrics, Work
from xtuner_core.errors import UserError

pytestmark = pytest.mark.slow

PARCEL = [{"role": "user", "content": "parcel"}, {"role": "assistant", "content": "shipping desk"}]
REFUND = [{"role": "user", "content": "refund"}, {"role": "assistant", "content": "billing"}]
MISTAKEN = [{"role": "user", "content": "parcel"}, {"role": "assistant", "content": "returns desk"}]
SMOKE = """
prompts:
  - {name: desk, user: parcel, expect: {equals: shipping desk, contains: [SHIP], language: en, min_tokens: 13, regex: 'desk$'}}
  - {name: lost, user: refund, expect: {equals: shipping desk}}
  - {name: late, user: refund, max_tokens: 4, expect: {max_seconds: 0.000001}}
"""


def _run(model: Path, out: Path, *rows: list[dict[str, str]], settings: tuple[str, ...] = ()) -> tuple[Metrics, Work, list[str]]:
    out.mkdir()
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    work = Work(
        {"model": model}, payload=out / "payload", record=out / "record", scratch=out / "scratch", cache=out / "cache", log=lines.append
    )
    work.payload.mkdir()
    work.record.mkdir()
    recipe = load_recipe("qwen3_tiny_full_openai", [f"chat.prompts={prompts}", "chat.count=3", "chat.max_tokens=20", *settings])
    return chat.STAGE.run(recipe, work), work, lines


def _servers() -> list[psutil.Process]:
    """Those of this test process; it may have other children, such as pytest-xdist's and Prefect's."""
    return [one for one in psutil.Process().children(recursive=True) if _serves(one)]


@pytest.fixture
def others() -> list[psutil.Process]:
    """The servers that were there before the test."""
    return _servers()


def _serves(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and {"transformers.cli.transformers", "serve"} <= set(process.cmdline())
    except psutil.Error:  # it ended while we looked
        return False


def test_right_answers_pass_the_same_way_each_time_and_the_server_goes(
    learned: Path, tmp_path: Path, others: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there: loopback must be reached without it
    strict = ("chat.must_stop=true", "chat.min_correct=1.0")
    metrics, work, _ = _run(learned, tmp_path / "one", PARCEL, REFUND, settings=strict)
    assert (metrics["passed"], metrics["total"], metrics["ok"], metrics["why"]) == (2, 2, True, [])
    assert _servers() == others
    written = json.loads((work.payload / "chat.json").read_text())
    assert [(row["answer"], row["finish"], row["correct"]) for row in written["answers"]] == [
        ("shipping desk", "stop", True),
        ("billing", "stop", True),
    ]
    assert "Uvicorn" in (work.record / "server.log").read_text()
    latency = json.loads((work.record / "latency.json").read_text())
    assert [row["asked"] for row in latency["answers"]] == ["line 1", "line 2"]
    assert [(row["tokens"], row["counted_by"]) for row in latency["answers"]] == [(14, "server"), (8, "server")]  # bytes, and the end
    assert all(0 < row["first_token_seconds"] < row["seconds"] and row["tokens_per_second"] > 0 for row in latency["answers"])
    assert metrics["first_token_seconds"] == latency["first_token_seconds"] > 0

    _, again, _ = _run(learned, tmp_path / "two", PARCEL, REFUND, settings=strict)
    assert (again.payload / "chat.json").read_bytes() == (work.payload / "chat.json").read_bytes()


@pytest.fixture(scope="module")
def running(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The settings that ask a server which runs already."""
    with serve(Request(learned / "model"), tmp_path_factory.mktemp("server") / "log", print) as endpoint:
        yield ("chat.chatter=openai", f"chat.url={endpoint.base_url}#{endpoint.model}")


def test_a_failed_verdict_is_a_result_not_an_error(learned: Path, tmp_path: Path, running: tuple[str, str]) -> None:
    settings = (
        *running,
        "chat.must_stop=true",
        "chat.min_correct=0.5",
        "chat.max_tokens=13",
        # "shipping desk" has 13 bytes: its end comes too late
    )
    metrics, work, lines = _run(learned, tmp_path / "out", MISTAKEN, REFUND, PARCEL, settings=settings)
    assert (metrics["passed"], metrics["total"], metrics["ok"]) == (2, 3, False)
    assert metrics["why"] == ["2 of 3 answers did not end by themselves within 13 tokens"]
    assert (work.payload / "chat.json").is_file()
    assert "2 of 3 answers are right" in lines[-1]


def test_each_smoke_prompt_that_fails_is_named_and_lateness_is_no_part_of_the_payload(
    learned: Path, tmp_path: Path, running: tuple[str, str]
) -> None:
    smoke = tmp_path / "smoke.yaml"
    smoke.write_text(SMOKE)
    metrics, work, lines = _run(learned, tmp_path / "out", PARCEL, settings=(*running, f"chat.smoke={smoke}", "chat.count=1"))
    failed = ["smoke prompt lost is not 'shipping desk'", "smoke prompt late did not end by itself within 4 tokens"]
    assert [reason.partition(" took ")[0] for reason in metrics["why"]] == [*failed, "smoke prompt late"]
    assert (metrics["smoke_passed"], metrics["smoke_total"], metrics["passed"], metrics["ok"]) == (1, 3, 1, False)
    written = json.loads((work.payload / "chat.json").read_text())
    assert (written["why"], written["ok"]) == (failed, False)
    assert [row["name"] for row in written["smoke"]] == ["desk", "lost", "late"]
    assert "took" in json.loads((work.record / "latency.json").read_text())["late"][0]
    assert "chat: 1 of 3 smoke prompts pass, 1 of 1 answers are right, first token after" in lines[-1]


def test_a_server_that_cannot_load_the_model_is_a_readable_error(learned: Path, tmp_path: Path, others: list[psutil.Process]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(learned, broken)
    (broken / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"(?s)ended with status 1 before it answered.*[Ss]afetensor"):
        _run(broken, tmp_path / "out", PARCEL)
    assert _servers() == others


def test_a_server_that_dies_between_two_questions_is_a_readable_error(learned: Path, tmp_path: Path, others: list[psutil.Process]) -> None:
    model = learned / "model"
    log = tmp_path / "server.log"
    with (
        pytest.raises(UserError, match=r"(?s)the chat server did not answer.*Uvicorn running"),
        serve(Request(model), log, print) as endpoint,
        client(endpoint, log) as openai,
    ):
        question = {"model": endpoint.model, "messages": PARCEL[:1], "max_tokens": 20, "temperature": 0}
        assert ask(openai, question, model).text == "shipping desk"
        for process in set(_servers()) - set(others):
            process.kill()
        ask(openai, question, model)
    assert _servers() == others
