"""`xtuner chat MODEL`, as it is typed in a terminal (a pseudo one) and through pipes, with a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipelines.chatters import Request
from pipelines.chatters.transformers import serve
from xtuner_core.data.formats import openai
from xtuner_core.models.preset import create_from_preset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHAT = [sys.executable, "-m", "pipelines.cli", "chat"]
PATIENCE = 60
"""Seconds, on a busy machine."""
CONTROL_C, CONTROL_D = "\x03", "\x04"


@dataclass(slots=True)
class Terminal:
    """The keyboard and the screen of a program."""

    process: subprocess.Popen[bytes]
    end: int
    """Ours of the pseudo-terminal."""
    unread: str = ""
    """What came after the last mark."""

    def type(self, text: str) -> None:
        """What a user types; a line ends with \\r, as the Enter key sends it."""
        os.write(self.end, text.encode())

    def read_until(self, mark: str, seconds: float = PATIENCE) -> list[str]:
        """The pieces that came up to and with `mark`, as they came."""
        pieces = [self.unread]
        deadline = time.monotonic() + seconds
        while mark not in "".join(pieces):
            ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.unread = "".join(pieces)
                raise AssertionError(f"no {mark!r} within {seconds} s: {self.unread!r}")
            pieces.append(os.read(self.end, 65536).decode(errors="replace"))
        self.unread = "".join(pieces).partition(mark)[2]
        return pieces

    def press_until(self, key: str, mark: str) -> str:
        """Press again when nothing happens, as a user would: a signal may come in the instant before a program waits for one."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.type(key)
            try:
                return "".join(self.read_until(mark, 10))
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def leaves(self, key: str = "") -> int:
        """Its exit code, once it has ended; `key` is pressed for that, again when nothing happens."""
        start = time.monotonic()
        presses = 0
        while (status := self.process.poll()) is None:
            waited = time.monotonic() - start
            assert waited < PATIENCE, "still running"
            if key and waited >= 10 * presses:
                self.type(key)
                presses += 1
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    os.read(self.end, 65536)
                except OSError:  # nobody is at the other end
                    return self.process.wait(PATIENCE)
        return status


@contextmanager
def _terminal(model: Path, *options: str) -> Iterator[Terminal]:
    """The command in a pseudo-terminal of its own, up to its first prompt; its history is kept beside the model."""
    ours, its = pty.openpty()
    env = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(model.parent / "state")}
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN_TERMINAL, *CHAT, str(model), *options], cwd=ROOT, env=env, stdin=its, stdout=its, stderr=its
    )
    os.close(its)
    terminal = Terminal(process, ours)
    try:
        terminal.read_until("> ")
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(ours)


_OWN_TERMINAL = "import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Then Ctrl-C in it becomes a signal, as in a real one."""


def _piped(typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *arguments], input=typed, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)


def _until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _children(terminal: Terminal) -> list[psutil.Process]:
    found = psutil.Process(terminal.process.pid).children(recursive=True)
    assert found, "there must be a server"
    return found


def _gone(processes: list[psutil.Process]) -> bool:
    return _until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes), 20)


def test_a_conversation_in_a_terminal(learned: Path, tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    with _terminal(learned / "model", "--max-tokens", "20") as terminal:
        servers = _children(terminal)
        terminal.type("parcel\r")
        pieces = terminal.read_until("first after")
        assert len([piece for piece in pieces if re.search(r"[a-z]", piece)]) >= 5, "the answer must come token by token"
        screen = "".join(pieces)
        assert "shipping desk\r\n" in screen
        assert re.search(r"\x1b\[2m\(14 tokens, [0-9.]+ tokens/s, first after", screen), "dimmed"
        terminal.type("/reset\r")
        terminal.read_until("(forgotten)")
        terminal.type("refund\r")
        assert "billing\r\n" in "".join(terminal.read_until("first after"))
        for command, told in (
            (f"/save {saved}", "one more line of"),
            (f"/save {tmp_path}", "Is a directory"),
            ("RESET", "(forgotten)"),
            (f"/save {saved}", "(nothing was said yet)"),
            ("/system Route it.", "(system prompt set)"),
            ("/nosuch", "/retry"),
        ):
            terminal.type(f"{command}\r")
            terminal.read_until(told)
        typed = ('"""\r', "two\r", 'lines"""\r', "one\\\r", "more\r", "\x1b[200~three\rpasted\rlines\x1b[201~", "\r")
        for text in typed:
            terminal.type(text)
            if text in ('lines"""\r', "more\r", "\r"):
                terminal.read_until("first after")
        terminal.type("/retry\r")
        terminal.read_until("first after")
        terminal.type(f"/save {saved}\r")
        terminal.read_until("one more line of")
        terminal.read_until("> ")
        assert terminal.leaves(CONTROL_D) == 0
        assert _gone(servers)
    first, second = (json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines())
    assert first == {"messages": [{"role": "user", "content": "refund"}, {"role": "assistant", "content": "billing"}]}
    assert [turn["content"] for turn in second["messages"][::2][:1]] == ["Route it."]
    assert [turn["content"] for turn in second["messages"] if turn["role"] == "user"] == ["two\nlines", "one\nmore", "three\npasted\nlines"]
    assert len(openai.parse(second).messages) == 7, "data.train must take it"
    history = learned / "state" / "xtuner" / "chat_history"
    assert "parcel\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_control_c_stops_the_answer_and_twice_the_conversation(endless: Path) -> None:
    with _terminal(endless, "--max-tokens", "4000") as terminal:
        servers = _children(terminal)
        for _ in range(2):  # after a stopped answer the same server gives the next one
            terminal.type("parcel\r")
            terminal.read_until("ship")
            terminal.press_until(CONTROL_C, "(stopped)")
            terminal.read_until("> ")
        assert _children(terminal) == servers
        terminal.type("half a line")
        terminal.read_until("half a line")  # the terminal throws away what readline has not read yet, and readline then waits for a key
        terminal.press_until(CONTROL_C, "ends the conversation.")
        terminal.read_until("> ")
        terminal.type("/reset\r")  # then it takes two again
        terminal.read_until("(forgotten)")
        terminal.read_until("> ")
        terminal.press_until(CONTROL_C, "ends the conversation.")
        terminal.read_until("> ")
        assert terminal.leaves(CONTROL_C) == 0
        assert _gone(servers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_conversation_even_while_an_answer_comes(
    endless: Path, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with _terminal(endless, "--max-tokens", "4000") as terminal:
        servers = _children(terminal)
        terminal.type("parcel\r")
        terminal.read_until("ship")
        terminal.process.send_signal(number)
        terminal.read_until(f"ended by {number.name}")
        assert terminal.leaves() == 75
        assert _gone(servers)
        assert not list(tmp_path.glob("xtuner-*"))


def test_a_server_that_dies_in_the_middle_of_an_answer_is_one_message(endless: Path) -> None:
    with _terminal(endless, "--max-tokens", "4000") as terminal:
        servers = _children(terminal)
        terminal.type("parcel\r")
        terminal.read_until("ship")
        servers[-1].kill()
        said = "".join(terminal.read_until("The end of its log"))
        assert "error: the chat server did not answer" in said and "Traceback" not in said
        assert terminal.leaves() == 70
        assert _gone(servers)


def test_through_pipes_only_answers_come_out(learned: Path) -> None:
    done = _piped("parcel\n\nreset\n/system\nrefund\nexit\nparcel\n", str(learned / "model"))
    assert (done.returncode, done.stdout) == (0, "shipping desk\nbilling\n")
    assert "(forgotten)\n(no system prompt)\n" in done.stderr
    assert "\x1b" not in done.stderr


def test_with_an_adapter_the_merged_model_answers(learned: Path, adapter: Path) -> None:
    done = _piped("parcel\n", str(learned), "--adapter", str(adapter))  # the artifact's folder will do, as well as the model's in it
    assert (done.returncode, done.stdout) == (0, "returns\n")


def test_an_adapter_of_another_base_is_one_message(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_from_preset("qwen3-moe-tiny", other, seed=0)
    done = _piped("parcel\n", str(other), "--adapter", str(adapter))
    assert (done.returncode, done.stdout) == (65, "")
    assert re.search(r"error: .*adapter", done.stderr) and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def address(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that runs already."""
    with serve(Request(learned / "model"), tmp_path_factory.mktemp("server") / "log", print) as endpoint:
        yield f"{endpoint.base_url}#{endpoint.model}"


def test_a_server_that_runs_already(address: str) -> None:
    done = _piped("refund\n", "--url", address)
    assert (done.returncode, done.stdout) == (0, "billing\n")


def test_temperature_is_honoured_and_the_seed_repeats_an_answer(address: str) -> None:
    sampled = ("--url", address, "--max-new-tokens", "12", "--temperature", "2", "--top-p", "0.95")
    answers = _piped("parcel\nreset\n" * 5, *sampled).stdout.splitlines()
    assert len(set(answers)) > 1, "the sampled answers are all the same: the server ignored the temperature"
    answers = _piped("parcel\nreset\n" * 2, *sampled, "--seed", "7").stdout
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :], "the seed was ignored"
