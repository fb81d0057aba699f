"""Answers are read as they come, from servers that tell the number of tokens and from such that do not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.chatters import Endpoint
from pipelines.client import Reply, ask, client
from xtuner_core.errors import UserError

Serve = Callable[[list[Any]], Endpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that streams these chunks, or sends these bytes."""
    servers: list[HTTPServer] = []

    def start(chunks: list[Any]) -> Endpoint:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for chunk in chunks:
                    self.wfile.write(chunk if isinstance(chunk, bytes) else f"data: {json.dumps(chunk)}\n\n".encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _chunk(finish: str | None = None, usage: int | None = None, **delta: str) -> dict[str, Any]:
    counted = {"prompt_tokens": 1, "completion_tokens": usage, "total_tokens": 1} if usage else None
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice], "usage": counted}


def _ask(endpoint: Endpoint, model: Path, log: Path) -> tuple[Reply, list[tuple[str, bool]]]:
    shown: list[tuple[str, bool]] = []
    with client(endpoint, log) as openai:
        reply = ask(openai, {"model": "m", "messages": []}, model, lambda piece, thought: shown.append((piece, thought)))
    return reply, shown


def test_thoughts_are_shown_but_no_part_of_the_answer(serve: Serve, tmp_path: Path) -> None:
    chunks = [_chunk(role="assistant"), _chunk(reasoning_content="hm"), _chunk(content="a"), _chunk(content="b"), _chunk("length")]
    last = {**_chunk(usage=7), "choices": []}  # as OpenAI and vLLM send it
    reply, shown = _ask(serve([*chunks, last]), tmp_path, tmp_path / "log")
    assert (reply.text, reply.finish, reply.tokens, reply.counted_by) == ("ab", "length", 7, "server")
    assert shown == [("hm", True), ("a", False), ("b", False)]
    assert 0 < (reply.first_token_seconds or 0) <= reply.seconds


def test_the_model_s_tokenizer_counts_where_the_server_does_not(serve: Serve, tmp_path: Path, tiny_model_folder: Path) -> None:
    reply, _ = _ask(serve([_chunk(content="four"), _chunk("stop")]), tiny_model_folder, tmp_path / "log")
    assert (reply.tokens, reply.counted_by) == (4, "tokenizer")
    reply, _ = _ask(serve([_chunk(content="four"), _chunk(content="teen"), _chunk("stop")]), tmp_path, tmp_path / "log")
    assert (reply.tokens, reply.counted_by) == (2, "pieces")


def test_an_answer_without_an_end_did_not_stop(serve: Serve, tmp_path: Path, tiny_model_folder: Path) -> None:
    assert _ask(serve([_chunk(content="a")]), tiny_model_folder, tmp_path / "log")[0].finish == "none"


@pytest.mark.parametrize(
    ("chunk", "told"), [(b"data: {torn\n\n", ""), ({"error": "out of memory"}, "out of memory")], ids=["torn", "error"]
)
def test_a_server_in_trouble_is_a_readable_error_with_the_end_of_its_log(chunk: Any, told: str, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\nlast words")
    with pytest.raises(UserError, match=rf"(?s)the chat server did not answer: .*{told}.*last words"):
        _ask(serve([_chunk(content="a"), chunk]), tmp_path, tmp_path / "log")
