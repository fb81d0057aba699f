"""A conversation in the terminal, with the same servers and client as stage chat.

Answers go to the standard output; all else that is said goes to the standard error output, so that pipes carry only answers.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines import chatters
from pipelines.chatters import START_SECONDS, Request
from pipelines.client import Reply, ask, client, reason
from pipelines.served_model import model_to_serve
from pipelines.terminal.prompt_template import template_name, with_template
from pipelines.terminal.typed import line_editing, read_message
from xtuner_core.errors import Interrupted, RecipeError

if TYPE_CHECKING:
    from openai import OpenAI
    from rich.console import Console

HELP = """\
/reset          forget the conversation        /retry        answer the last message once more
/system TEXT    set the system prompt          /save FILE    append the conversation to FILE, as data.train reads it
/help           this list                      /exit         end (or Ctrl-D, or Ctrl-C twice); Ctrl-C stops an answer
A message of several lines: end lines with \\, or put it between lines of \"\"\", or paste it."""
_OLD_WORDS = {"exit": "/exit", "EXIT": "/exit", "reset": "/reset", "RESET": "/reset"}
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's text must not move the cursor or rename the window."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversation is held."""

    system: str | None = None
    adapter: Path | None = None
    """Merged into the model for the conversation."""
    prompt_template: str | None = None
    """Served instead of the template exported with the model."""
    chatter: str = "auto"
    url: str | None = None
    """A server that runs already, in place of one of our own."""
    max_tokens: int = 512
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float | None = None
    seed: int | None = None
    """Of the sampling."""
    start_timeout: int = START_SECONDS


@dataclass(slots=True)
class Talk:
    """A running conversation."""

    answer: Callable[[list[dict[str, str]]], Reply]
    """Of the model, printed as it comes."""
    tell: Console
    """For all that is not an answer."""
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """What is sent, and saved."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


def converse(model: Path, options: Options) -> None:
    """Serve `model` and talk to it until `/exit`, the end of the input, or Ctrl-C twice.

    Raises:
        RecipeError: not a model folder, an unknown chatter or template.
        DataError: the adapter does not fit the model.
        UserError: the server failed.
        Interrupted: SIGTERM, SIGHUP.
    """
    from rich.console import Console

    tell = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    chatter = chatters.choose("openai" if options.url else options.chatter)
    if options.prompt_template:
        template_name(options.prompt_template)  # before an adapter is merged
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):  # the latter: the terminal is gone; nohup ignores it
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, _terminate))
        folder = _served(stack, model, options, tell)
        log = Path(stack.enter_context(TemporaryDirectory(prefix="xtuner-chat-")), "server.log")
        request = Request(folder, start_timeout=options.start_timeout, url=options.url)
        endpoint = stack.enter_context(chatter.serve(request, log, lambda line: tell.print(line, style="dim")))
        openai = stack.enter_context(client(endpoint, log))
        stack.enter_context(line_editing())
        sampling = {"top_p": options.top_p, "seed": options.seed}
        fixed = {"model": endpoint.model, "max_tokens": options.max_tokens, "temperature": options.temperature}
        fixed |= {name: value for name, value in sampling.items() if value is not None}
        _talk(Talk(lambda messages: _answer(openai, fixed | {"messages": messages}, folder, tell), tell, options.system))


def _served(stack: ExitStack, model: Path, options: Options, tell: Console) -> Path:
    """The folder that is given to the server, until the stack is closed."""
    if options.url:
        if options.adapter or options.prompt_template:
            raise RecipeError("--adapter and --prompt-template change what is served; the server at --url serves what it has.")
        return model
    tell.print(f"Loading {model}{f' with {options.adapter}' if options.adapter else ''} ...", style="dim")
    merged = stack.enter_context(model_to_serve(model, options.adapter))
    return stack.enter_context(with_template(merged, options.prompt_template, lambda note: tell.print(note, style="yellow")))


def _terminate(number: int, frame: object) -> None:
    raise Interrupted(f"the conversation was ended by {signal.Signals(number).name}.")


def _talk(talk: Talk) -> None:
    if sys.stdin.isatty():
        talk.tell.print("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the conversation.", style="dim")
    for text in _messages(talk.tell):
        typed = _OLD_WORDS.get(text.strip(), text.strip())
        command = _COMMAND.fullmatch(typed)
        if command and command[1] == "exit":
            return
        if command:
            _COMMANDS.get(command[1], _unknown)(talk, (command[2] or "").strip())
        elif typed:
            talk.turns.append({"role": "user", "content": text})
            with suppress(KeyboardInterrupt):  # pressed just after the answer's end
                _respond(talk)


def _messages(tell: Console) -> Iterator[str]:
    """What the user types, message by message, until Ctrl-D or the second Ctrl-C in a row."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    pressed = False
    while True:
        try:
            text = read_message(prompt)
        except EOFError:
            if prompt:
                tell.print()
            return
        except KeyboardInterrupt:
            tell.print()
            if pressed or not prompt:
                return
            tell.print("Ctrl-C again, or Ctrl-D, ends the conversation.", style="dim")
            pressed = True
            continue
        pressed = False
        yield text


def _respond(talk: Talk) -> None:
    """Have the last message answered; one that is refused, or stopped before a word came, is forgotten. Nobody is there to ask again
    behind a pipe: then a refusal ends the conversation with an error."""
    import openai

    try:
        reply = talk.answer(talk.messages())
    except openai.APIStatusError as error:
        if not sys.stdin.isatty():
            raise
        talk.tell.print(f"the server refuses this: {reason(error).translate(_CONTROL)}", style="red")
        talk.turns.pop()
        return
    if not reply.text and reply.finish == _STOPPED:
        talk.turns.pop()
        return
    talk.turns.append({"role": "assistant", "content": reply.text})


_STOPPED = "stopped"
"""How an answer finishes that Ctrl-C cut short."""


def _answer(openai: OpenAI, request: dict[str, Any], model_dir: Path, tell: Console) -> Reply:
    """Print the answer as it comes, and how fast it came; at Ctrl-C it is what came so far (closing the stream stops the server's work)."""
    written: list[str] = []
    with _stoppable() as pressed:

        def show(piece: str, thought: bool) -> None:
            if pressed.is_set():
                raise KeyboardInterrupt
            if thought:
                tell.print(piece.translate(_CONTROL), style="dim", end="")
                return
            written.append(piece)
            print(piece.translate(_CONTROL), end="", flush=True)

        try:
            reply = ask(openai, request, model_dir, show)
        except KeyboardInterrupt:
            reply = Reply("".join(written), _STOPPED, 0, "", None, 0.0)
    print(flush=True)
    if sys.stdin.isatty():
        tell.print(_told(reply, request["max_tokens"]), style="dim")
    return reply


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Inside the block Ctrl-C raises KeyboardInterrupt and sets the event: an exception that comes while an object is finalised is lost."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _told(reply: Reply, max_tokens: int) -> str:
    if reply.finish == _STOPPED:
        return "(stopped)"
    rate = f", {reply.tokens_per_second:.1f} tokens/s" if reply.tokens_per_second else ""
    first = f", first after {reply.first_token_seconds:.2f} s" if reply.first_token_seconds is not None else ""
    cut = f", cut at --max-tokens {max_tokens}" if reply.finish == "length" else ""
    return f"({reply.tokens} tokens{rate}{first}{cut})"


def _reset(talk: Talk, _: str) -> None:
    talk.turns.clear()
    talk.tell.print("(forgotten)", style="dim")


def _set_system(talk: Talk, text: str) -> None:
    talk.system = text or None
    talk.tell.print("(system prompt set)" if text else "(no system prompt)", style="dim")


def _retry(talk: Talk, _: str) -> None:
    if talk.turns and talk.turns[-1]["role"] == "assistant":
        talk.turns.pop()
    if talk.turns:
        _respond(talk)
    else:
        talk.tell.print("(there is nothing to answer)", style="dim")


def _save(talk: Talk, name: str) -> None:
    """One line of OpenAI chat JSONL more."""
    if not name or not talk.turns:
        talk.tell.print("(nothing was said yet)" if name else "(write /save FILE)", style="dim")
        return
    path = Path(name).expanduser()
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": talk.messages()}, ensure_ascii=False) + "\n")
    except OSError as error:
        talk.tell.print(f"{path}: not saved: {error.strerror}", style="red")
        return
    talk.tell.print(f"(saved, as one more line of {path})", style="dim")


def _help(talk: Talk, _: str) -> None:
    talk.tell.print(HELP, style="dim")


def _unknown(talk: Talk, _: str) -> None:
    talk.tell.print("(no such command)", style="dim")
    _help(talk, "")


_COMMANDS = {"reset": _reset, "system": _set_system, "retry": _retry, "save": _save, "help": _help}
