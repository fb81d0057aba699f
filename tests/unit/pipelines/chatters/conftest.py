"""A small real server under the code that all our chat servers run under."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest

from pipelines.chatters import Endpoint, Request
from pipelines.chatters._server import running

SMALL_SERVER = Path(__file__).with_name("small_server.py")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], object], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def family(folder: Path) -> list[int]:
    """The server's processes: itself, its engine, and one it disowned."""
    assert until((folder / "family").exists), "the server did not start"
    return [int(pid) for pid in (folder / "family").read_text().split()]


Serve = Callable[..., AbstractContextManager[Endpoint]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """`serve(behaviour, **request)`; what the server says is in `server.log`."""

    @contextmanager
    def start(behaviour: str, **request: object) -> Iterator[Endpoint]:
        def command(port: int) -> list[str]:
            return [sys.executable, str(SMALL_SERVER), str(port), str(tmp_path), behaviour]

        with running(command, Request(tmp_path, **request), tmp_path / "server.log", print) as endpoint:
            yield endpoint

    return start
