"""A real server answers for a tiny model that learned two answers: the stage, its errors, and the terminal conversation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from pipelines import chat
from pipelines.chat import ask, client
from pipelines.chatters import Request
from pipelines.chatters.transformers import serve
from pipelines.heldout import HeldOut
from pipelines.recipe import load_recipe
from pipelines.stage import Metrics, Work
from xtuner_core.errors import UserError
from xtuner_core.models.preset import create_from_preset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PARCEL = [{"role": "user", "content": "parcel"}, {"role": "assistant", "content": "shipping desk"}]
REFUND = [{"role": "user", "content": "refund"}, {"role": "assistant", "content": "billing"}]
MISTAKEN = [{"role": "user", "content": "parcel"}, {"role": "assistant", "content": "returns desk"}]

TALK = """
import sys
from pathlib import Path
from pipelines.terminal_chat import converse
converse(Path(sys.argv[1]), None, int(sys.argv[2]), float(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `model` is a tiny Qwen3 that was trained on PARCEL and REFUND until it knew them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # An `@` in a path means a revision to the server, unless we prevent it.
    folder = tmp_path_factory.mktemp("a@b c") / "model"
    create_from_preset("qwen3-tiny", folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    whole = [tokenizer.apply_chat_template(rows, return_tensors="pt", return_dict=False) for rows in (PARCEL, REFUND)]
    for _ in range(60):
        for tokens in whole:
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder.parent


@pytest.fixture(scope="module")
def endless(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but no token ends its turn."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(learned / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 263, "pad_token_id": 258, "suppress_tokens": [263]}))
    return folder


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


def _serves(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and {"transformers.cli.transformers", "serve"} <= set(process.cmdline())
    except psutil.Error:  # it ended while we looked
        return False


def _until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_right_answers_pass_the_same_way_each_time_and_the_server_goes(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there: loopback must be reached without it
    strict = ("chat.must_stop=true", "chat.min_correct=1.0")
    metrics, work, _ = _run(learned, tmp_path / "one", PARCEL, REFUND, settings=strict)
    assert (metrics["passed"], metrics["total"], metrics["ok"], metrics["why"]) == (2, 2, True, [])
    assert not _servers()
    written = json.loads((work.payload / "chat.json").read_text())
    assert [(row["answer"], row["finish"], row["correct"]) for row in written["answers"]] == [
        ("shipping desk", "stop", True),
        ("billing", "stop", True),
    ]
    assert "Uvicorn" in (work.record / "server.log").read_text()
    assert len(json.loads((work.record / "latency.json").read_text())["answer_seconds"]) == 2

    _, again, _ = _run(learned, tmp_path / "two", PARCEL, REFUND, settings=strict)
    assert (again.payload / "chat.json").read_bytes() == (work.payload / "chat.json").read_bytes()


def test_a_failed_verdict_is_a_result_not_an_error(learned: Path, tmp_path: Path) -> None:
    settings = ("chat.must_stop=true", "chat.min_correct=0.5", "chat.max_tokens=13")  # "shipping desk" has 13 bytes: its end comes too late
    metrics, work, lines = _run(learned, tmp_path / "out", MISTAKEN, REFUND, PARCEL, settings=settings)
    assert (metrics["passed"], metrics["total"], metrics["ok"]) == (2, 3, False)
    assert metrics["why"] == ["2 of 3 answers did not end by themselves within 13 tokens"]
    assert (work.payload / "chat.json").is_file()
    assert "2 of 3 answers are right" in lines[-1]


def test_a_server_that_cannot_load_the_model_is_a_readable_error(learned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(learned, broken)
    (broken / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"(?s)ended with status 1 before it answered.*[Ss]afetensor"):
        _run(broken, tmp_path / "out", PARCEL)
    assert not _servers()


def test_a_server_that_dies_between_two_questions_is_a_readable_error(learned: Path, tmp_path: Path) -> None:
    question = HeldOut((PARCEL[0],), "shipping desk", 1)
    log = tmp_path / "server.log"
    with (
        pytest.raises(UserError, match=r"(?s)the chat server did not answer.*Uvicorn running"),
        serve(Request(learned / "model"), log, print) as endpoint,
        client(endpoint, log) as openai,
    ):
        assert ask(openai, endpoint.model, question, 20)[0].correct
        for process in _servers():
            process.kill()
        ask(openai, endpoint.model, question, 20)
    assert not _servers()


@contextmanager
def _conversation(model: Path, max_tokens: int, temperature: float = 0) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    command = [sys.executable, "-c", TALK, str(model), str(max_tokens), str(temperature)]
    env = os.environ | {"TMPDIR": str(model.parent)}  # what a killed one leaves behind is cleared away with the test's folders
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin
    assert process.stdout
    try:
        yield process, process.stdin, process.stdout
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _read_until(stream: IO[Any], mark: bytes) -> list[bytes]:
    """The pieces that came up to and with `mark`, as they came."""
    pieces: list[bytes] = []
    while mark not in b"".join(pieces):
        piece = os.read(stream.fileno(), 65536)
        assert piece, f"ended before {mark!r}: {b''.join(pieces)!r}"
        pieces.append(piece)
    return pieces


def test_conversation_through_a_pipe(learned: Path) -> None:
    with _conversation(learned / "model", 20) as (process, write, read):
        _read_until(read, b"> ")
        write.write(b"parcel\n")
        pieces = _read_until(read, b"> ")
        assert b"".join(pieces) == b"shipping desk\n> "
        assert len(pieces) >= 5, "the answer must come token by token"
        write.write(b"\nreset\nrefund\nexit\nparcel\n")
        assert process.wait(30) == 0
        assert read.read() == b"> (forgotten)\n> billing\n> "


def test_control_c_stops_the_answer_then_the_conversation(endless: Path) -> None:
    with _conversation(endless, 4000) as (process, write, read):
        _read_until(read, b"> ")
        servers = psutil.Process(process.pid).children(recursive=True)
        for _ in range(2):  # after a stopped answer the same server gives the next one
            write.write(b"parcel\n")
            _read_until(read, b"ship")
            process.send_signal(signal.SIGINT)
            assert b"".join(_read_until(read, b"> ")).endswith(b" (stopped)\n> ")
        assert psutil.Process(process.pid).children(recursive=True) == servers
        # A signal between input()'s prompt and its read() would go unseen until the next key (CPython); nobody presses that fast.
        assert _until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING, 10)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not any(server.is_running() for server in servers)


def test_no_server_outlives_a_killed_conversation(endless: Path) -> None:
    with _conversation(endless, 4000) as (process, write, read):
        _read_until(read, b"> ")
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers
        write.write(b"parcel\n")
        _read_until(read, b"ship")
        process.kill()
        assert _until(lambda: not any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in servers), 20)


def test_temperature_is_honoured(learned: Path) -> None:
    with _conversation(learned / "model", 12, temperature=2) as (process, write, read):
        write.write(b"parcel\nreset\n" * 5 + b"exit\n")
        answers = [line for line in read.read().split(b"\n")[3:] if b"forgotten" not in line]
        assert process.wait(30) == 0
    assert len(set(answers)) > 1, "the sampled answers are all the same: the server ignored the temperature"
