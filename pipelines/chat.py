"""Stage chat: the exported model is served and asked held-out questions, as a user would ask it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import chatters
from pipelines.chatters import Endpoint, Request
from pipelines.heldout import HeldOut, read_heldout
from pipelines.processes import tail
from pipelines.recipe import ChatConfig, Recipe, resolve_path
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError, UserError

if TYPE_CHECKING:
    from openai import OpenAI


@dataclass(frozen=True, slots=True)
class Answer:
    """A question and what the model made of it."""

    messages: tuple[dict[str, str], ...]
    expected: str
    answer: str
    finish: str
    """`stop`: the model ended its turn; `length`: it was cut at max_tokens."""
    correct: bool


def run(recipe: Recipe, work: Work) -> Metrics:
    """Serve the model, ask, and judge; a failed verdict is a result (`ok` false), trouble with the server an error.

    Raises:
        UserError: the server did not start, ended or refused a question.
    """
    config = recipe.chat
    samples = spread(read_heldout(prompts), config.count) if (prompts := _prompts(recipe)) else []
    server_log = work.record / "server.log"
    work.log(f"chat: {len(samples)} held-out questions for {config.chatter}; its output is in {server_log}")
    started = time.monotonic()
    request = Request(work.inputs["model"] / "model", port=config.port, start_timeout=config.start_timeout, url=config.url)
    with chatters.choose(config.chatter).serve(request, server_log, work.log) as endpoint:
        start_seconds = time.monotonic() - started
        with client(endpoint, server_log) as openai:
            timed = [ask(openai, endpoint.model, sample, config.max_tokens) for sample in samples]
    result = judge([answer for answer, _ in timed], config)
    write_json(work.payload / "chat.json", result)
    write_json(work.record / "latency.json", {"start_seconds": start_seconds, "answer_seconds": [seconds for _, seconds in timed]})
    work.log(f"chat: {result['passed']} of {result['total']} answers are right" + "".join(f"; {reason}" for reason in result["why"]))
    return result | {"answers": result["answers"][:3]}


def spread(samples: list[HeldOut], count: int) -> list[HeldOut]:
    """`count` of them (all, if there are fewer) at even distances."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


@contextmanager
def client(endpoint: Endpoint, server_log: Path) -> Iterator[OpenAI]:
    """An OpenAI client that speaks to loopback directly, whatever proxy the environment names.

    Raises:
        UserError: a request failed; the message holds the end of the server's log.
    """
    import openai

    direct = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, http_client=direct) as connection:
        try:
            yield connection
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise UserError(f"the chat server did not answer: {error}. The end of its log:\n{tail(server_log)}") from None


def ask(openai: OpenAI, model: str, sample: HeldOut, max_tokens: int) -> tuple[Answer, float]:
    """The model's greedy answer, and the seconds it took."""
    started = time.monotonic()
    messages: Any = sample.messages
    reply = openai.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_tokens)
    text, finish = reply.choices[0].message.content or "", reply.choices[0].finish_reason
    correct = text.strip() == sample.expected.strip()
    return Answer(sample.messages, sample.expected, text, finish, correct), time.monotonic() - started


def judge(answers: list[Answer], config: ChatConfig) -> dict[str, Any]:
    """The verdict: how many are right, whether that is enough, and if not, why."""
    total = len(answers)
    passed = sum(answer.correct for answer in answers)
    empty = sum(not answer.answer.strip() for answer in answers)
    cut = sum(answer.finish != "stop" for answer in answers)
    why = []
    if empty:
        why.append(f"{empty} of {total} answers are empty")
    if cut and config.must_stop:
        why.append(f"{cut} of {total} answers did not end by themselves within {config.max_tokens} tokens")
    if passed < config.min_correct * total:
        why.append(f"{passed} of {total} answers are right, chat.min_correct asks for a share of {config.min_correct:g}")
    return {"passed": passed, "total": total, "ok": not why, "why": why, "answers": [asdict(answer) for answer in answers]}


def _prompts(recipe: Recipe) -> Path | None:
    if recipe.chat.prompts is None:
        return None
    path = resolve_path(recipe.chat.prompts)
    if not path.is_file():
        raise DataError(f"{path}: no such file. It is chat.prompts of recipe {recipe.name}; correct the path or make the file.")
    return path


STAGE = Stage(
    name="chat",
    version=1,
    run=run,
    # Of the prompts, the bytes count.
    settings=lambda recipe: recipe.chat.model_dump(mode="json", exclude={"port", "prompts", "start_timeout"}),
    files=lambda recipe: [path for path in [_prompts(recipe)] if path],
    libraries=("torch", "transformers", "tokenizers"),
)
