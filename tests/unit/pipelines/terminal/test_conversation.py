"""What is refused before a server starts, each with one message; and the command's options of old."""

from __future__ import annotations

import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.terminal.conversation import Options, converse
from xtuner_core.errors import RecipeError


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(chatter="nobody"), "'nobody' is not one of the chatters: .*transformers"),
        (Options(prompt_template="nosuch"), "--prompt-template nosuch: unknown; known are chatml, .*internlm2_chat"),
        (Options(prompt_template="llama2_chat"), "--prompt-template llama2_chat: this old template is not shipped"),
        (Options(), "not a model folder"),
        (Options(url="http://127.0.0.1:9/v1", adapter=Path("a")), "--adapter and --prompt-template change what is served"),
    ],
)
def test_refused(options: Options, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=reason):
        converse(tmp_path / "gone", options)


def test_a_folder_that_is_no_adapter(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not an adapter folder"):
        converse(tiny_model_folder, Options(adapter=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (("--bits", "4", "--lagent"), ("--bits: models are served in the precision", "--lagent: this chat runs no tools")),
        (("--no-streamer",), ("--no-streamer: answers always come as a stream",)),
        (("--top-k", "40"), ("--top-k: the chat protocol has no such field",)),
        (("--system", "Be brief."), ("--system: for a conversation with a model, and there is no folder somewhere",)),
        (("--chatter", "vllm", "--max-tokens", "9"), ("--chatter, --max-tokens: for a conversation with a model",)),
        ((), ("recipe 'somewhere': no such file", "Nor is there a model folder somewhere")),
        (("--temperature", "-1"), ("Must be >= 0",)),
        (("--top-p", "1.5"), ("Must be <= 1",)),
        (("--max-new-tokens", "0"), ("--max-new-tokens. Must be >",)),
    ],
)
def test_old_options_and_wrong_values(arguments: tuple[str, ...], reasons: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "somewhere", *arguments]) == 78
    told = capsys.readouterr()
    assert all(reason in told.err + told.out for reason in reasons)


def test_a_conversation_takes_no_options_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--set", "chat.max_tokens=9"), ("--store", str(tmp_path))):
        assert main(["chat", str(tmp_path), *arguments]) == 78
        assert "--set and --store are for the smoke test of a recipe" in capsys.readouterr().err


class _Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"too long")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_behind_a_pipe_a_refused_question_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert main(["chat", "--url", f"http://127.0.0.1:{server.server_port}/v1#m"]) == 70
        server.shutdown()
    assert "the chat server did not answer: Error code: 400: too long." in capsys.readouterr().err
