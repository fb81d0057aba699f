"""What a chat template renders a conversation to, before any token exists."""

from __future__ import annotations

from typing import NamedTuple


class Control(NamedTuple):
    """A control token, by its name in the vocabulary. It enters as an id only, never as text."""

    token: str
    loss: bool = False


class Text(NamedTuple):
    """Plain text; neighbouring texts are encoded as one piece, with control tokens disabled."""

    text: str
    loss: bool = False


Piece = Control | Text
