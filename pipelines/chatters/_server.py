"""What chat servers that we start share: a port, the wait until the server is healthy, its end."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines.chatters import LOOPBACK, Request
from pipelines.processes import Child, child, tail
from pipelines.stage import Log
from xtuner_core.errors import RecipeError, UserError

GRACE_SECONDS = 10
POLL_SECONDS = 0.2


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], port: int, request: Request, log_file: Path, log: Log, cwd: Path | None = None
) -> Iterator[None]:
    """Inside the block the server `command` is healthy on `port` of loopback; after it, it and all its children are gone.

    Raises:
        UserError: the server ended, or was not healthy in `request.start_timeout` seconds; the message holds the end of its log.
    """
    started = time.monotonic()
    with child(command, log_file, env, GRACE_SECONDS, cwd=cwd) as server:
        _wait(server, port, request.start_timeout)
        log(f"chat: the server answers on {LOOPBACK}:{port} after {time.monotonic() - started:.1f} s")
        yield


def usable_port(port: int | None, host: str = LOOPBACK) -> int:
    """`port`, or a free one if it is None.

    Raises:
        RecipeError: another process has it, or we may not use it.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise RecipeError(
                f"port {port} on {host} cannot be used: {error.strerror}{_holder(port)}. "
                "Choose another one (--port, or chat.port of the recipe), or leave it out to get a free one."
            ) from None
        return probe.getsockname()[1]


def _holder(port: int | None) -> str:
    """Who listens there, as far as we may know."""
    with suppress(psutil.Error):
        for pid in (connection.pid for connection in _listening(psutil.net_connections("tcp"), port) if connection.pid):
            return f" (process {pid}, {psutil.Process(pid).name()})"
    return ""


def _listening(connections: Sequence[Any], port: int | None) -> list[Any]:
    return [item for item in connections if item.status == psutil.CONN_LISTEN and item.laddr.port == port]


def _wait(server: Child, port: int, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while not (_is_its_own(server.process.pid, port) and _is_healthy(port)):
        status = server.process.poll()
        if status is not None:
            raise UserError(f"the chat server ended with status {status} before it answered. The end of its log:\n{tail(server.output)}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the chat server did not answer within {timeout} s (chat.start_timeout). The end of its log:\n{tail(server.output)}"
            )
        time.sleep(POLL_SECONDS)


def _is_its_own(pid: int, port: int) -> bool:
    """Whether the server or a child of it listens there: another process may have taken the port while the model was loading."""
    with suppress(psutil.Error):
        server = psutil.Process(pid)
        return any(_listens(process, port) for process in (server, *server.children(recursive=True)))
    return False


def _listens(process: psutil.Process, port: int) -> bool:
    with suppress(psutil.Error):
        return bool(_listening(process.net_connections("tcp"), port))
    return False


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
