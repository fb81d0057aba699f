"""`transformers serve` of this environment, on loopback: needs no GPU, takes one if there is one."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from pipelines.chatters import Endpoint
from pipelines.processes import Child, child, tail
from pipelines.stage import Log
from xtuner_core.errors import RecipeError, UserError

HOST = "127.0.0.1"
MODEL = "model"
START_SECONDS = 900
"""A large model may come from a slow disk."""
GRACE_SECONDS = 10
POLL_SECONDS = 0.2
_NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONSAFEPATH": "1"}
_POLITE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Waiting threads sleep: spinning ones made answers ten times slower beside one other busy process (2 cores)."""


@contextmanager
def serve(model_dir: Path, port: int | None, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """Serve a Hugging Face folder in the precision of its weights.

    Raises:
        RecipeError: `port` is taken.
        UserError: the server ended or did not answer in `START_SECONDS`; the message holds the end of its log.
    """
    port = _free_port() if port is None else _require_free(port)
    with TemporaryDirectory(prefix="xtuner-chat-") as folder:
        _lay_out(model_dir.resolve(), Path(folder, MODEL))
        with child(_command(port), log_file, _POLITE | os.environ | _NO_NETWORK, GRACE_SECONDS, cwd=Path(folder)) as server:
            started = time.monotonic()
            _wait(server, port)
            log(f"chat: the server answers on {HOST}:{port} after {time.monotonic() - started:.1f} s")
            yield Endpoint(f"http://{HOST}:{port}/v1", MODEL)


def _command(port: int) -> list[str]:
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL]
    return [*serve, "--host", HOST, "--port", str(port), "--device", "auto", "--dtype", "auto"]


def _lay_out(model_dir: Path, served: Path) -> None:
    """Links to the model's files, under a name without an `@` (which the server takes for a revision).

    The generation config says `do_sample`: otherwise the server ignores a request's temperature. (Temperature 0 is greedy nevertheless.)
    """
    served.mkdir()
    for item in model_dir.iterdir():
        (served / item.name).symlink_to(item)
    generation = served / "generation_config.json"
    with suppress(FileNotFoundError, ValueError):
        sampling = json.loads(generation.read_text(encoding="utf-8")) | {"do_sample": True}
        generation.unlink()
        generation.write_text(json.dumps(sampling), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _require_free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RecipeError(
                f"chat.port: port {port} on {HOST} cannot be used: {error.strerror}{_holder(port)}. "
                "Choose another one with --set chat.port=, or leave chat.port out to get a free one."
            ) from None
    return port


def _holder(port: int) -> str:
    """Who listens there, as far as we may know."""
    with suppress(psutil.Error):
        for pid in (connection.pid for connection in _listening(psutil.net_connections("tcp"), port) if connection.pid):
            return f" (process {pid}, {psutil.Process(pid).name()})"
    return ""


def _listening(connections: Sequence[Any], port: int) -> list[Any]:
    return [item for item in connections if item.status == psutil.CONN_LISTEN and item.laddr.port == port]


def _wait(server: Child, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _ready(server.process.pid, port):
        status = server.process.poll()
        if status is not None:
            raise UserError(f"the chat server ended with status {status} before it answered. The end of its log:\n{tail(server.output)}")
        if time.monotonic() > deadline:
            raise UserError(f"the chat server did not answer within {START_SECONDS} s. The end of its log:\n{tail(server.output)}")
        time.sleep(POLL_SECONDS)


def _ready(pid: int, port: int) -> bool:
    """Whether the server is up, and it is ours: another may have taken the port while the model was loading."""
    try:
        if not _listening(psutil.Process(pid).net_connections("tcp"), port):
            return False
    except psutil.Error:
        return False
    request = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        request.request("GET", "/health")
        return request.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        request.close()
