"""The OpenAI client that stage chat and the terminal talk to a model with: streamed answers, and how fast they came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.chatters import Endpoint
from pipelines.processes import tail
from xtuner_core.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI


Show = Callable[[str, bool], None]
"""Takes a piece of the answer; true says that it is a thought, which comes before the answer's text."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and how it came."""

    text: str
    finish: str
    """`stop`: the model ended its turn; `length`: it was cut at max_tokens."""
    tokens: int
    counted_by: str
    """`server`, with the token that ends the turn; where it does not tell, `tokenizer`: the model's own, on the text; without one `pieces`:
    what the server streamed at once is mostly one token."""
    first_token_seconds: float | None
    """From the request to the first text; None if none came."""
    seconds: float
    """From the request to the end."""

    @property
    def tokens_per_second(self) -> float | None:
        """While it was written: without the first token, which waits for the prompt to be read."""
        if self.first_token_seconds is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-6)


@contextmanager
def client(endpoint: Endpoint, server_log: Path) -> Iterator[OpenAI]:
    """An OpenAI client that speaks to loopback directly, whatever proxy the environment names.

    Raises:
        UserError: a request failed; the message holds the end of the server's log.
    """
    import openai

    here = urlsplit(endpoint.base_url).hostname in ("localhost", "127.0.0.1", "::1")
    connection = openai.DefaultHttpxClient(trust_env=not here)
    with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, http_client=connection) as client:
        try:
            yield client
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            log = f" The end of its log:\n{tail(server_log)}" if server_log.is_file() else ""
            raise UserError(f"the chat server did not answer: {reason(error)}.{log}") from None


def reason(error: Exception) -> str:
    """What a server says of its refusal; the client's own words leave it out unless it is said in OpenAI's way."""
    body = getattr(error, "body", None)
    told = isinstance(body, str) or (isinstance(body, dict) and "message" not in body)
    return f"{error}: {body}" if told else str(error)


def ask(openai: OpenAI, request: Mapping[str, Any], model_dir: Path, show: Show = lambda text, thought: None) -> Reply:
    """Send a request (`model`, `messages`, `max_tokens`, …) and read the answer as it comes, each piece handed to `show` at once.

    `model_dir`: its tokenizer counts if the server does not.
    """
    started = time.monotonic()
    pieces: list[str] = []
    finish, first, tokens = "none", None, None
    with openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices[:1]:
                finish = choice.finish_reason or finish
                for piece, thought in ((_thought(choice.delta), True), (choice.delta.content, False)):
                    if piece:
                        first = first if first is not None else time.monotonic() - started
                        pieces += [] if thought else [piece]
                        show(piece, thought)
    seconds = time.monotonic() - started
    return Reply("".join(pieces), finish, *_counted(tokens, pieces, model_dir), first, seconds)


def _thought(delta: Any) -> str | None:
    """What a reasoning model thinks before it answers; servers send it under a name that is not OpenAI's."""
    return getattr(delta, "reasoning_content", None)


def _counted(tokens: int | None, pieces: list[str], model_dir: Path) -> tuple[int, str]:
    if tokens is not None:
        return tokens, "server"
    tokenizer = model_dir / "tokenizer.json"
    if not tokenizer.is_file():
        return len(pieces), "pieces"
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(str(tokenizer)).encode("".join(pieces), add_special_tokens=False).ids), "tokenizer"
