"""Servers we start: none is left, however we end; trouble at the start is told; no secret reaches them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from pipelines import chatters, environments
from pipelines.chatters import Request
from pipelines.chatters._server import usable_port
from tests.unit.pipelines.chatters.conftest import SMALL_SERVER, Serve, alive, family, until
from xtuner_core import registry
from xtuner_core.errors import RecipeError, UserError

ROOT = SMALL_SERVER.parents[4]

PARENT = """
import sys, time
from pathlib import Path
from pipelines.chatters import Request
from pipelines.chatters._server import running
program, folder, behaviour, token = sys.argv[1:]
request = Request(Path(folder), token=token or None)
with running(lambda port: [sys.executable, program, str(port), folder, behaviour], request, Path(folder, "server.log"), print):
    Path(folder, "up").touch()
    time.sleep(120)
"""


def _parent(folder: Path, behaviour: str, token: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PARENT, str(SMALL_SERVER), str(folder), behaviour, token]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    if behaviour != "late":
        assert until((folder / "up").exists)
    return process


def _end(process: subprocess.Popen[bytes], processes: list[int]) -> None:
    process.kill()
    process.wait()
    for pid in filter(alive, processes):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("behaviour", "token"), [("obeys", ""), ("deaf", ""), ("late", ""), ("obeys", "0123456789abcdef")])
def test_kill_9_of_the_parent_leaves_no_process_of_the_server(tmp_path: Path, behaviour: str, token: str) -> None:
    process = _parent(tmp_path, behaviour, token)
    started = [one.pid for one in psutil.Process(process.pid).children(recursive=True)] + family(tmp_path)
    try:
        assert all(alive(pid) for pid in started)
        process.kill()
        assert until(lambda: not any(alive(pid) for pid in started), 20)  # a deaf one has ten seconds of grace
    finally:
        _end(process, started)


def test_control_c_ends_it_and_a_second_one_does_not_wait_for_a_deaf_server(tmp_path: Path) -> None:
    process = _parent(tmp_path, "deaf")
    server, engine, disowned = family(tmp_path)
    try:
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert alive(server), "the first Ctrl-C gives the server its grace"
        process.send_signal(signal.SIGINT)
        process.wait(8)
        assert not any(alive(pid) for pid in (server, engine, disowned))
    finally:
        _end(process, [server, engine, disowned])


def test_the_block_ends_the_server_and_its_engines(serve: Serve, tmp_path: Path) -> None:
    with serve("obeys") as endpoint:
        assert endpoint.base_url.startswith("http://127.0.0.1:")
        processes = family(tmp_path)
        assert all(alive(pid) for pid in processes)
    assert not any(alive(pid) for pid in processes)


def test_no_secret_of_ours_reaches_a_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("OPENAI_API_KEY", "XTUNER_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY", "VLLM_API_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    with serve("obeys") as endpoint, urllib.request.urlopen(endpoint.base_url.replace("/v1", "/environment")) as answer:
        told = json.load(answer)
    assert "canary" not in json.dumps(told)
    assert (told["HF_HUB_OFFLINE"], told["CUDA_VISIBLE_DEVICES"]) == ("1", "3")
    assert (told["TRITON_CACHE_DIR"], told["XDG_CACHE_HOME"]) == ("/scratch/kernels", "/scratch/cache"), "a home may be small or read-only"


def test_a_server_that_dies_at_once_is_told_with_its_last_lines(serve: Serve) -> None:
    with pytest.raises(UserError, match=r"(?s)ended with status 1 before it answered.*no such weights"), serve("dies"):
        pytest.fail("it is not healthy")


@pytest.mark.parametrize("behaviour", ["sick", "late"])
def test_a_server_that_never_becomes_healthy_is_ended(serve: Serve, tmp_path: Path, behaviour: str) -> None:
    with (
        pytest.raises(UserError, match=r"did not answer within 3 s \(chat.start_timeout, ") as caught,
        serve(behaviour, start_timeout=3),
    ):
        pytest.fail("it is not healthy")
    assert behaviour == "late" or "listening" in str(caught.value)
    assert not any(alive(pid) for pid in family(tmp_path))


def test_a_port_in_use_is_told_with_who_holds_it(serve: Serve, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(RecipeError, match=rf"port {port} on 127.0.0.1 cannot be used: .*\(process {os.getpid()}, "),
            serve("obeys", port=port),
        ):
            pytest.fail("the port is not ours")
    assert not (tmp_path / "family").exists()


@pytest.mark.parametrize(("port", "host"), [(70000, "127.0.0.1"), (None, "192.0.2.1"), (None, "a." * 200), (None, "no such host")])
def test_an_address_that_cannot_be_ours_is_told(port: int | None, host: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be used: .*the address must be one of this machine"):
        usable_port(port, host)


class Healthy(BaseHTTPRequestHandler):
    """What another program may answer on our port."""

    asked = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200)
        self.end_headers()


def test_another_server_that_takes_the_port_meanwhile_is_not_mistaken_for_ours(serve: Serve) -> None:
    port, taken = usable_port(None), threading.Event()

    def take() -> None:
        with HTTPServer(("127.0.0.1", port), Healthy) as other:
            other.timeout = 0.1
            while not taken.is_set():
                other.handle_request()

    taker = threading.Timer(1, take)
    taker.start()
    try:
        with pytest.raises(UserError, match="did not answer within 5 s"), serve("late", port=port, start_timeout=5):
            pytest.fail("that is another server")
    finally:
        taken.set()
        taker.join()
    assert Healthy.asked > 3


@pytest.mark.parametrize("name", ["transformers", "vllm", "lmdeploy"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_no_server_listens_for_others_without_a_token(
    name: str, host: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "ensure", lambda name, log: Path(sys.executable))  # lmdeploy's own needs a GPU
    with (
        pytest.raises(RecipeError, match="needs a token"),
        registry.find(chatters, name).serve(Request(tiny_model_folder, host=host), tmp_path / "log", print),
    ):
        pytest.fail("it serves")


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "line\nfeed-in-the-token", "ünïcödé-letters-here"])
def test_a_token_that_cannot_protect_is_refused(serve: Serve, token: str) -> None:
    with pytest.raises(RecipeError, match="at least 16 characters") as caught, serve("obeys", host="0.0.0.0", token=token):
        pytest.fail("it serves")
    assert not token or token not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Request(Path("m"), token="hidden")) + repr(chatters.Endpoint("u", "m", "hidden"))
