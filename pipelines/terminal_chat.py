"""A conversation in the terminal, with the same server and client as stage chat."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines import chatters
from pipelines.chatters import Request
from pipelines.client import client
from xtuner_core.errors import RecipeError

if TYPE_CHECKING:
    from openai import OpenAI

HELP = "exit (or Ctrl-D) ends, reset forgets the conversation, Ctrl-C stops an answer."
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's text must not move the cursor or rename the window."""


def converse(model_dir: Path, system: str | None, max_tokens: int, temperature: float, chatter: str = "auto") -> None:
    """Serve `model_dir` and talk to it until `exit`, the end of the input, or Ctrl-C at the prompt.

    `max_tokens`: longest answer. `temperature`: 0 is greedy.

    Raises:
        RecipeError: not a model folder, or an unknown chatter.
        UserError: the server failed.
    """
    _require_model(model_dir)
    serve = chatters.choose(chatter).serve
    print(f"Loading {model_dir} ...", flush=True)
    with TemporaryDirectory(prefix="xtuner-chat-") as folder:
        log = Path(folder, "server.log")
        with serve(Request(model_dir), log, print) as endpoint, client(endpoint, log) as openai:
            print(HELP, flush=True)
            request = {"model": endpoint.model, "max_tokens": max_tokens, "temperature": temperature}
            _talk(openai, request, [{"role": "system", "content": system}] if system else [])


def _require_model(model_dir: Path) -> None:
    if (model_dir / "config.json").is_file():
        return
    inside = [folder for folder in (model_dir / "payload" / "model", model_dir / "model") if (folder / "config.json").is_file()]
    hint = f" Did you mean {inside[0]}?" if inside else ""
    raise RecipeError(
        f"{model_dir}: not a model folder. One holds config.json, *.safetensors and tokenizer.json, "
        f"like payload/model of a convert artifact.{hint}"
    )


def _talk(openai: OpenAI, request: dict[str, Any], opening: list[Any]) -> None:
    history = list(opening)
    while (text := _read()) is not None:
        match text.strip():
            case "":
                continue
            case "exit" | "EXIT":
                return
            case "reset":
                history = list(opening)
                print("(forgotten)", flush=True)
                continue
        history.append({"role": "user", "content": text})
        history.append({"role": "assistant", "content": _answer(openai, request, history)})


def _read() -> str | None:
    """The next line, None at the end of the input or at Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history
    try:
        return input("> ").encode(errors="replace").decode()
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return None


def _answer(openai: OpenAI, request: dict[str, Any], history: list[Any]) -> str:
    """Print the answer as it comes and return it; at Ctrl-C, what has come so far (closing the stream stops the server's work)."""
    answer = ""
    try:
        with openai.chat.completions.create(**request, messages=history, stream=True) as stream:
            for chunk in stream:
                text = (chunk.choices[0].delta.content if chunk.choices else None) or ""
                answer += text
                print(text.translate(_CONTROL), end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(flush=True)
    return answer
