"""What `make up` hands to the service, and the service to its parts."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.service import Service, environment_of, is_healthy
from pipelines.recipe import PROJECT

SECRETS = {"AUTH": "someone:canary-of-auth", "DATABASE_URL": "postgresql+asyncpg://prefect:canary-of-database@127.0.0.1/prefect"}


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_make_up_hands_its_passwords_to_the_service_and_to_nothing_that_it_starts(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "xtuner"
    stand_in.write_text("#!/bin/sh\nenv -0\n")
    stand_in.chmod(0o700)
    (tmp_path / "ready").touch()
    given = [f"{name}={secret}" for name, secret in SECRETS.items()]
    command = ["make", "--silent", "up", f"BIN={tmp_path}", f"READY={tmp_path / 'ready'}", *(given if by == "argument" else [])]
    env = {"PATH": os.environ["PATH"], **(SECRETS if by == "environment" else {})}
    told = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True).stdout
    handed = dict(one.split("=", 1) for one in told.strip("\0\n").split("\0"))
    assert {name: handed[f"XTUNER_{name}"] for name in SECRETS} == SECRETS
    monkeypatch.setattr(os, "environ", handed)
    inherited = environment_of(Service(tmp_path, 4200, tmp_path, "recipe", {}))
    assert [name for name, value in inherited.items() if "canary" in value] == []


def service_at(port: int) -> Service:
    return Service(Path(), port, Path(), "recipe", {})


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def healthy() -> Iterator[int]:
    """The port of a server that answers."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_server_on_loopback_is_not_asked_for_by_the_proxy(healthy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert is_healthy(service_at(healthy))
    assert environment_of(service_at(healthy))["no_proxy"] == "127.0.0.1"
    monkeypatch.setenv("NO_PROXY", "intranet")
    inherited = environment_of(service_at(healthy))
    assert (inherited["no_proxy"], inherited["NO_PROXY"]) == ("intranet,127.0.0.1", "intranet,127.0.0.1")
    monkeypatch.setenv("no_proxy", "*")
    assert environment_of(service_at(healthy))["no_proxy"] == "*"


def test_a_program_that_speaks_something_else_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            with server.accept()[0] as connection:
                connection.recv(1024)
                connection.sendall(b"hello, stranger\r\n\r\n")

        speaker = threading.Thread(target=speak)
        speaker.start()
        assert not is_healthy(service_at(server.getsockname()[1]))
        speaker.join()
