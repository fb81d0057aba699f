"""Processes are ended in order, and one that was made to stand still does not stay so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from flows.ending import birth, end, frozen, living

WAITS = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE) as started:
        assert started.stdout and started.stdout.readline() == b"ready\n"
        yield psutil.Process(started.pid)
        started.kill()


def test_an_impatient_person_leaves_no_process_that_stands_still(process: psutil.Process) -> None:
    with pytest.raises(KeyboardInterrupt), frozen(process):
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED:  # it stops when it is next on a processor
            assert time.monotonic() < deadline
        raise KeyboardInterrupt
    assert process.status() != psutil.STATUS_STOPPED


def test_a_process_that_stands_still_is_ended_in_order(process: psutil.Process) -> None:
    born = birth(process)
    assert living(process.pid, born) == process
    with frozen(process):
        end([process], 60)
    assert process.wait() == 7, "it was killed, not told"
    assert living(process.pid, born) is None


def test_one_that_is_gone_is_no_error(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    with frozen(process):
        end([process], 0)


def test_a_process_is_known_again_after_the_clock_was_set(process: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    from psutil import _pslinux

    born, booted = birth(process), psutil.boot_time()
    monkeypatch.setattr(_pslinux, "boot_time", lambda: booted + 3600)
    assert psutil.Process(process.pid).create_time() - process.create_time() == pytest.approx(3600, abs=1)
    assert living(process.pid, born)
    assert living(process.pid, f"another-boot {born.split()[1]}") is None
