"""What a user types into a conversation: one line or several, with arrow keys and the lines of earlier conversations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

QUOTES = '"""'
HISTORY_LINES = 1000


def read_message(prompt: str) -> str:
    """The next message: a line; lines that end in a backslash and the one after them; or a block between lines of three quotes.

    Lines that are pasted into a terminal with readline come as one message.

    Raises:
        EOFError: the input has ended.
        KeyboardInterrupt: Ctrl-C.
    """
    line = _line(prompt)
    more = "… " if prompt else ""
    if line.lstrip().startswith(QUOTES):
        return _block(line.lstrip().removeprefix(QUOTES), more)
    with suppress(EOFError):
        while line.endswith("\\"):
            line = line[:-1] + "\n" + _line(more)
    return line


def _block(line: str, more: str) -> str:
    """The lines up to one that ends in three quotes, or up to the end of the input."""
    lines = [line]
    with suppress(EOFError):
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(_line(more))
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")


def _line(prompt: str) -> str:
    return input(prompt).encode(errors="replace").decode()  # bytes that are not UTF-8


@contextmanager
def line_editing() -> Iterator[None]:
    """Inside the block input() has arrow keys and a history, which is kept for the next time, if the input is a terminal."""
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    from platformdirs import user_state_path

    file = user_state_path("xtuner") / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(mode=0o600)
            readline.write_history_file(file)
