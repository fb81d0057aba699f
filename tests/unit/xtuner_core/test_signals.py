"""Asked to stop once: at the next step. Asked twice: at once. The launcher gone: stop as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from xtuner_core.signals import ONE_REQUEST_SECONDS, StopRequest

WAITING = "from xtuner_core.signals import *; import time; stop = StopRequest(); print('ready', flush=True)\nwhile True: time.sleep(0.05)"
LAUNCHER = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True); input()"
ORPHAN = "from xtuner_core.signals import *; import time; die_with_parent(); open(r'{}', 'w').close(); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        time.sleep(0.3)
        if number == signal.SIGTERM:  # the same request by another way
            process.send_signal(number)
            time.sleep(ONE_REQUEST_SECONDS)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == -number


def test_a_rank_is_told_when_its_launcher_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", LAUNCHER, ORPHAN.format(ready)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout
        rank = psutil.Process(int(launcher.stdout.readline()))
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.kill()
        psutil.wait_procs([rank], timeout=10)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
