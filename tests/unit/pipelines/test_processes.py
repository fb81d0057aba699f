"""Child processes: their output is followed, and none of them is left, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.processes import child, follow, tail

ROOT = Path(__file__).resolve().parents[3]

# Writes its own and its grandchild's process number to FILE, then waits. The grandchild ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
grandchild = subprocess.Popen(
    [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE, start_new_session={own_session})
grandchild.stdout.readline()
open(sys.argv[1] + ".part", "w").write(f"{{os.getpid()}} {{grandchild.pid}}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
{then}
"""
WAIT = "time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

# A parent that starts FAMILY through our code and waits.
PARENT = """
import os, sys
from pathlib import Path
from pipelines.processes import child, follow
with child([sys.executable, "-c", sys.argv[1], sys.argv[2]], Path(sys.argv[3]), os.environ, grace=float(sys.argv[4])) as running:
    follow(running, print)
"""


def _python(code: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-c", code, *arguments]


def _until(condition: Callable[[], object], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _family(file: Path) -> list[int]:
    assert _until(file.exists), "the child did not start"
    return [int(pid) for pid in file.read_text().split()]


def test_every_line_is_followed_and_the_status_returned(tmp_path: Path) -> None:
    code = "import sys, time; print('one', flush=True); time.sleep(0.3); sys.stderr.write('two\\nthr'); sys.stderr.write('ee'); sys.exit(7)"
    lines: list[str] = []
    with child(_python(code), tmp_path / "log", os.environ, grace=1) as running:
        assert follow(running, lines.append) == 7
    assert lines == ["one", "two", "three"]
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree"


def test_output_of_an_earlier_attempt_is_kept_but_not_followed_again(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("earlier\n")
    lines: list[str] = []
    with child(_python("print('now')"), tmp_path / "log", os.environ, grace=1) as running:
        follow(running, lines.append)
    assert lines == ["now"]
    assert tail(tmp_path / "log") == "earlier\nnow"


def test_a_progress_bar_is_shown_in_its_last_state_and_odd_bytes_do_no_harm(tmp_path: Path) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'0%\r50%\r100%\r\n\xff\n')"
    lines: list[str] = []
    with child(_python(code), tmp_path / "log", os.environ, grace=1) as running:
        follow(running, lines.append)
    assert lines == ["100%", "\ufffd"]


def test_the_child_gets_only_the_given_environment_and_no_input(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ.get('HOME'), os.environ['GIVEN'], repr(sys.stdin.read()))"
    lines: list[str] = []
    with child(_python(code), tmp_path / "log", {"GIVEN": "yes"}, grace=1) as running:
        assert follow(running, lines.append) == 0
    assert lines == ["None yes ''"]


def test_a_timeout_is_raised_and_the_child_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError), child(_python("import time; time.sleep(60)"), tmp_path / "log", os.environ, grace=5) as running:
        follow(running, print, timeout=0.3)
    assert running.process.returncode == -signal.SIGTERM


def test_a_child_that_obeys_sigterm_ends_in_its_own_way(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('ready', flush=True); time.sleep(60)"
    with child(_python(code), tmp_path / "log", os.environ, grace=30) as running:
        assert _until(lambda: "ready" in tail(tmp_path / "log"))
    assert running.process.returncode == 5


@pytest.mark.parametrize(("own_session", "then"), [(False, WAIT), (False, DEAF), (True, DEAF)])
def test_a_grandchild_that_ignores_sigterm_is_killed(tmp_path: Path, own_session: bool, then: str) -> None:
    code = FAMILY.format(own_session=own_session, then=then)
    with child(_python(code, tmp_path / "family"), tmp_path / "log", os.environ, grace=0.5):
        family = _family(tmp_path / "family")
        assert all(_alive(pid) for pid in family)
    assert _until(lambda: not any(_alive(pid) for pid in family), 5)


@pytest.mark.parametrize("own_session", [False, True])
def test_a_grandchild_that_outlives_its_parent_is_killed(tmp_path: Path, own_session: bool) -> None:
    code = FAMILY.format(own_session=own_session, then="sys.exit(3)")
    with child(_python(code, tmp_path / "family"), tmp_path / "log", os.environ, grace=0.5) as running:
        assert follow(running, print) == 3
        assert not any(_alive(pid) for pid in _family(tmp_path / "family"))


def _parent(tmp_path: Path, then: str, grace: float, own_session: bool = False) -> tuple[subprocess.Popen[bytes], list[int]]:
    family = FAMILY.format(own_session=own_session, then=then)
    command = _python(PARENT, family, tmp_path / "family", tmp_path / "log", str(grace))
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    return parent, _family(tmp_path / "family")


def _end(parent: subprocess.Popen[bytes], family: list[int]) -> None:
    parent.kill()
    parent.wait()
    for pid in filter(_alive, family):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("own_session", "then"), [(False, WAIT), (True, WAIT), (True, DEAF)])
def test_the_whole_family_dies_when_its_parent_is_killed_with_sigkill(tmp_path: Path, own_session: bool, then: str) -> None:
    parent, family = _parent(tmp_path, then, grace=0.5, own_session=own_session)
    try:
        parent.kill()
        assert _until(lambda: not any(_alive(pid) for pid in family), 10)
    finally:
        _end(parent, family)


def test_a_second_sigterm_does_not_cut_the_grace_short(tmp_path: Path) -> None:
    """The kernel sends one for each thread of a killed parent: a training that saves its checkpoint would be lost."""
    saves = (
        "import signal, sys, time; from pathlib import Path; "
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), Path(sys.argv[1]).touch(), sys.exit(0))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with child(_python(saves, tmp_path / "saved"), tmp_path / "log", os.environ, grace=30) as running:
        assert _until(lambda: "ready" in tail(tmp_path / "log"))
        for _ in range(4):
            running.process.terminate()
            time.sleep(0.1)
        assert running.process.wait(10) == 0
    assert (tmp_path / "saved").exists()


def test_the_child_dies_when_its_supervisor_is_killed_with_sigkill(tmp_path: Path) -> None:
    parent, family = _parent(tmp_path, WAIT, grace=0.5)
    try:
        psutil.Process(parent.pid).children()[0].kill()
        assert _until(lambda: not _alive(family[0]), 10)
    finally:
        _end(parent, family)


def test_control_c_ends_the_whole_family(tmp_path: Path) -> None:
    parent, family = _parent(tmp_path, WAIT, grace=5)
    try:
        parent.send_signal(signal.SIGINT)
        assert parent.wait(10) == -signal.SIGINT
        assert _until(lambda: not any(_alive(pid) for pid in family), 5)
    finally:
        _end(parent, family)


def test_a_second_control_c_does_not_wait_for_a_deaf_child(tmp_path: Path) -> None:
    parent, family = _parent(tmp_path, DEAF, grace=60)
    try:
        parent.send_signal(signal.SIGINT)
        time.sleep(1)
        assert all(_alive(pid) for pid in family), "the first Ctrl-C gives the child its grace"
        parent.send_signal(signal.SIGINT)
        parent.wait(10)
        assert _until(lambda: not any(_alive(pid) for pid in family), 5)
    finally:
        _end(parent, family)


def test_a_child_whose_parent_died_before_it_could_ask_does_not_start(tmp_path: Path) -> None:
    code = "import os; from pipelines.supervisor import die_with_parent; die_with_parent(os.getppid() + 1); print('started')"
    done = subprocess.run(_python(code), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"), child(["no-such-program"], tmp_path / "log", os.environ, grace=1):
        pytest.fail("nothing to run")


def test_tail_of_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "gone") == ""


def test_what_a_child_says_while_it_is_ended_is_handed_on(tmp_path: Path) -> None:
    saves = "import signal, sys, time\ndef save(*_: object):\n print('saved', flush=True)\n sys.exit(3)\n"
    saves += "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)"
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "ready":
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        child([sys.executable, "-c", saves], tmp_path / "log", os.environ, grace=30) as running,
    ):
        follow(running, on_line)
    assert lines == ["ready", "saved"]
    assert running.process.returncode == 3
