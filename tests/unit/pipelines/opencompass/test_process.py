"""What OpenCompass runs in: no secret, no network where it scores, and no process left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.chatters import Endpoint
from pipelines.opencompass import process
from xtuner_core.errors import DataError


def test_the_child_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    env = process.clean_environment(tmp_path)
    assert not {"HF_TOKEN", "PYTHONPATH"} & set(env)
    assert env["HOME"] == str(tmp_path)


needs_cage = pytest.mark.skipif(not process.network_cage(), reason="this kernel or container has no `unshare --net` for users")


@needs_cage
def test_the_cage_has_no_network_not_even_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert subprocess.run([sys.executable, "-c", connect], capture_output=True, check=False).returncode == 0
        caged = subprocess.run([*process.network_cage(), sys.executable, "-c", connect], capture_output=True, text=True, check=False)
    assert "Network is unreachable" in caged.stderr


@needs_cage
def test_what_runs_in_the_cage_dies_with_a_killed_parent(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from pipelines.opencompass.process import network_cage
        from pipelines.processes import child
        write = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        with child([*network_cage(), sys.executable, "-c", write], Path(sys.argv[1]), os.environ, grace=1):
            time.sleep(600)
    """)
    output = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, str(output)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        _wait_until(lambda: output.is_file() and output.read_text().strip() != "")
        caged = int(output.read_text())
        assert Path(f"/proc/{caged}").exists()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait_until(lambda: not _runs(caged))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


CANARY = "canary-0xC0FFEE"
HOSTILE = """
import glob, os
told = [str(dict(os.environ))]
for file in glob.glob("/proc/[0-9]*/environ"):
    try:
        told.append(open(file).read())
    except OSError:
        pass
open(os.path.expanduser("~/../seen.txt"), "w").write("".join(told))
"""


@needs_cage
def test_a_hostile_scorer_finds_no_secret_in_any_environment(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from pipelines.opencompass.process import caged
        caged([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), {"COMPASS_DATA_CACHE": "data"}, 60, print)
    """)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_TOKEN": CANARY, "OPENAI_API_KEY": CANARY}
    subprocess.run([sys.executable, "-c", program, HOSTILE, str(tmp_path)], env=env, check=True)
    seen = (tmp_path / "seen.txt").read_text()
    assert "COMPASS_DATA_CACHE" in seen
    assert CANARY not in seen


def test_against_a_server_only_the_asking_has_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for OpenCompass' Python writes down what it is given in each of the two runs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" "key=$OPENAI_API_KEY" >> "$(dirname "$0")/runs.txt"\n')
    python.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    said: list[str] = []
    process.run(python, tmp_path, Endpoint("http://127.0.0.1:1/v1", "m", "sesame"), None, 60, said.append)
    asking, scoring = (tmp_path / "runs.txt").read_text().splitlines()
    assert asking.endswith("--mode infer key=sesame")
    assert scoring.endswith("--mode eval --reuse latest key=")
    assert "with the network" in said[0]
    assert not any("sesame" in path.read_text() for path in tmp_path.glob("*.json"))


def test_a_run_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    dies = "import sys; print('11/21 - OpenCompass - ERROR - it failed\\n' * 30 + 'RuntimeError: the reason'); sys.exit(3)"
    with pytest.raises(
        DataError,
        match=r"(?s)ended with exit status 3\. Its last error: it failed\nThe end of .*opencompass\.log:\n.*RuntimeError: the reason",
    ):
        process.caged([sys.executable, "-c", dies], tmp_path, {}, 60, print)
    assert not (tmp_path / "scratch").exists()
