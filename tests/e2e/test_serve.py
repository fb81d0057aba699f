"""`xtuner serve` as a user starts it, with the real server: it answers whom it should, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.chatters._server import usable_port
from pipelines.cli import main
from pipelines.recipe import PROJECT

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-this-test"
QUESTION = {"model": "model", "max_tokens": 3, "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def _serving(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`xtuner serve`, once it tells how to ask; and what it told."""
    env = os.environ | {"TMPDIR": str(tmp_path), "XTUNER_TOKEN": TOKEN}
    command = [sys.executable, "-m", "pipelines.cli", "serve", *arguments, "--port", str(usable_port(None))]
    process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    told: list[str] = []
    try:
        for line in process.stdout:
            told.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert process.poll() is None, told
        yield process, told
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_it_answers_with_the_token_until_control_c(tiny_model_folder: Path, tmp_path: Path) -> None:
    artifact = tiny_model_folder.parents[1]
    with _serving(tmp_path, str(artifact), "--host", "0.0.0.0") as (process, told):
        assert TOKEN not in "".join(told)
        url = next(line.split()[1] for line in told if line.startswith("base_url:"))
        with httpx.Client(trust_env=False, timeout=60) as client:
            assert client.post(f"{url}/chat/completions", json=QUESTION).status_code == 401
            answer = client.post(f"{url}/chat/completions", json=QUESTION, headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.json()["usage"]["completion_tokens"] == 3
        servers = psutil.Process(process.pid).children(recursive=True)
        assert len(servers) == 4, "a supervisor and its program, twice"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout
        assert process.stdout.read().strip() == "stopped"
        assert not any(_alive(server) for server in servers)
        assert not list(tmp_path.glob("xtuner-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_nothing_is_left_when_it_is_ended_or_its_terminal_goes(tiny_model_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    with _serving(tmp_path, str(tiny_model_folder)) as (process, _):
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not list(tmp_path.glob("xtuner-*")), "with --adapter that would be a whole model"


def test_kill_9_leaves_no_server(tiny_model_folder: Path, tmp_path: Path) -> None:
    with _serving(tmp_path, str(tiny_model_folder)) as (process, _):
        servers = psutil.Process(process.pid).children(recursive=True)
        assert any("transformers.cli.transformers" in server.cmdline() for server in servers)
        process.kill()
        deadline = time.monotonic() + 20
        while any(_alive(server) for server in servers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(_alive(server) for server in servers)


def test_a_server_that_ends_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    with _serving(tmp_path, str(tiny_model_folder)) as (process, _):
        for server in psutil.Process(process.pid).children(recursive=True):
            if "transformers.cli.transformers" in server.cmdline()[:4]:
                server.kill()
        assert process.wait(30) == 70
        assert process.stdout
        assert "the chat server has ended" in process.stdout.read()


def test_what_is_no_model_or_no_way_to_serve_is_told_at_once(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XTUNER_TOKEN", raising=False)

    def told(*arguments: str) -> tuple[int, str]:
        return main(["serve", *arguments]), capsys.readouterr().err

    code, error = told(str(tmp_path))
    assert code == 78 and "not a model folder" in error
    assert "needs a token" in told(str(tmp_path), "--host", "0.0.0.0")[1], "before the model, which may take minutes to merge"
    assert "cannot be used" in told(str(tmp_path), "--port", "99999")[1]
    assert "a server that runs already" in told(str(tiny_model_folder), "--chatter", "openai")[1]
    assert "not an adapter folder" in told(str(tiny_model_folder), "--adapter", str(tmp_path))[1]
    assert told(str(tiny_model_folder), "--token-file", str(tmp_path / "gone"))[0] == 74
    (tmp_path / "token").write_bytes(b"\xff" * 40)
    assert told(str(tiny_model_folder), "--token-file", str(tmp_path / "token"))[0] == 78
    assert told(str(tiny_model_folder), "--start-timeout", "0")[0] == 78
