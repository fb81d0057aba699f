"""Stage chat: the exported model is served and asked, as a user would ask it: smoke prompts with expectations, held-out questions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipelines import chatters
from pipelines.chatters import Request
from pipelines.recipe import ChatConfig, Recipe, resolve_path
from pipelines.smoke.expectations import failures, slowness
from pipelines.smoke.lists import Prompt, load_smoke
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    from pipelines.client import Reply
    from pipelines.heldout import HeldOut

SHOWN = 3


def run(recipe: Recipe, work: Work) -> Metrics:
    """Serve the model, ask, and judge; a failed verdict is a result (`ok` false), trouble with the server an error.

    The payload holds what the answers say, the record how fast they came. An answer that was too slow is in the record and the metrics.

    Raises:
        RecipeError: the smoke test is unknown or wrong.
        UserError: the server did not start, ended or refused a question.
    """
    prompts, samples = _smoke(recipe.chat), _samples(recipe)
    work.log(f"chat: {len(prompts)} smoke prompts and {len(samples)} held-out questions for {recipe.chat.chatter}")
    asked = [(one.name, one.conversation(), one.max_tokens) for one in prompts]
    asked += [(f"line {one.line}", list(one.messages), recipe.chat.max_tokens) for one in samples]
    start_seconds, replies = _ask_all([(messages, limit) for _, messages, limit in asked], recipe.chat, work)
    result = judge(prompts, replies[: len(prompts)], samples, replies[len(prompts) :], recipe.chat)
    write_json(work.payload / "chat.json", result)
    late = [f"smoke prompt {one.name} {why}" for one, reply in zip(prompts, replies, strict=False) if (why := slowness(one.expect, reply))]
    speed = _speed(replies)
    rows = [{"asked": name} | _times(reply) for (name, _, _), reply in zip(asked, replies, strict=True)]
    write_json(work.record / "latency.json", {"start_seconds": start_seconds, **speed, "late": late, "answers": rows})
    metrics = result | speed | {"ok": result["ok"] and not late, "why": result["why"] + late} | _for_the_page(result)
    work.log(f"chat: {told(metrics)}")
    return metrics


def _ask_all(asked: Sequence[tuple[list[dict[str, str]], int]], config: ChatConfig, work: Work) -> tuple[float, list[Reply]]:
    """The seconds until the server was there, and its greedy answers to conversations, each with its longest length in tokens."""
    from pipelines.client import ask, client

    model_dir, server_log = work.inputs["model"] / "model", work.record / "server.log"
    request = Request(model_dir, port=config.port, start_timeout=config.start_timeout, url=config.url)
    started = time.monotonic()
    with chatters.choose(config.chatter).serve(request, server_log, work.log) as endpoint, client(endpoint, server_log) as openai:
        start_seconds = time.monotonic() - started
        greedy = {"model": endpoint.model, "temperature": 0}
        return start_seconds, [ask(openai, greedy | {"messages": messages, "max_tokens": limit}, model_dir) for messages, limit in asked]


def spread(samples: list[HeldOut], count: int) -> list[HeldOut]:
    """`count` of them (all, if there are fewer) at even distances."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def judge(
    prompts: Sequence[Prompt], to_prompts: Sequence[Reply], samples: Sequence[HeldOut], to_samples: Sequence[Reply], config: ChatConfig
) -> dict[str, Any]:
    """The verdict: which prompts pass, how many held-out answers are right, whether that is enough, and if not, why."""
    smoke = [_smoke_row(prompt, reply) for prompt, reply in zip(prompts, to_prompts, strict=True)]
    answers = [_answer_row(sample, reply) for sample, reply in zip(samples, to_samples, strict=True)]
    why = [f"smoke prompt {row['name']} {reason}" for row in smoke for reason in row["failures"]] + list(_heldout_failures(answers, config))
    return {
        "passed": sum(row["correct"] for row in answers),
        "total": len(answers),
        "smoke_passed": sum(not row["failures"] for row in smoke),
        "smoke_total": len(smoke),
        "ok": not why,
        "why": why,
        "answers": answers,
        "smoke": smoke,
    }


def told(metrics: Mapping[str, Any]) -> str:
    """What came out, in one line."""
    parts = []
    if metrics["smoke_total"]:
        parts.append(f"{metrics['smoke_passed']} of {metrics['smoke_total']} smoke prompts pass")
    if metrics["total"]:
        parts.append(f"{metrics['passed']} of {metrics['total']} answers are right")
    if metrics["tokens_per_second"] is not None:
        parts.append(f"first token after {metrics['first_token_seconds']:.2f} s, then {metrics['tokens_per_second']:.0f} tokens/s")
    return "; ".join([", ".join(parts), *metrics["why"]])


def _smoke_row(prompt: Prompt, reply: Reply) -> dict[str, Any]:
    shown = {"name": prompt.name, "messages": prompt.conversation(), "answer": reply.text, "finish": reply.finish}
    return shown | {"failures": list(failures(prompt.expect, reply))}


def _answer_row(sample: HeldOut, reply: Reply) -> dict[str, Any]:
    correct = reply.text.strip() == sample.expected.strip()
    shown = {"messages": sample.messages, "expected": sample.expected, "answer": reply.text, "finish": reply.finish}
    return shown | {"correct": correct}


def _heldout_failures(answers: Sequence[Mapping[str, Any]], config: ChatConfig) -> Iterator[str]:
    total = len(answers)
    if empty := sum(not row["answer"].strip() for row in answers):
        yield f"{empty} of {total} answers are empty"
    if config.must_stop and (cut := sum(row["finish"] != "stop" for row in answers)):
        yield f"{cut} of {total} answers did not end by themselves within {config.max_tokens} tokens"
    passed = sum(row["correct"] for row in answers)
    if passed < config.min_correct * total:
        yield f"{passed} of {total} answers are right, chat.min_correct asks for a share of {config.min_correct:g}"


def _for_the_page(result: Mapping[str, Any]) -> dict[str, Any]:
    """The first answers, for the page about the run; all of them are in the payload."""
    return {"answers": result["answers"][:SHOWN], "smoke": result["smoke"][:SHOWN]}


def _times(reply: Reply) -> dict[str, Any]:
    return {
        "seconds": reply.seconds,
        "first_token_seconds": reply.first_token_seconds,
        "tokens": reply.tokens,
        "counted_by": reply.counted_by,
        "tokens_per_second": reply.tokens_per_second,
    }


def _speed(replies: Sequence[Reply]) -> dict[str, float | None]:
    """Medians over the answers; None if no answer was long enough to tell."""
    first = [reply.first_token_seconds for reply in replies if reply.first_token_seconds is not None]
    rate = [reply.tokens_per_second for reply in replies if reply.tokens_per_second is not None]
    return {"first_token_seconds": median(first) if first else None, "tokens_per_second": median(rate) if rate else None}


def _smoke(config: ChatConfig) -> tuple[Prompt, ...]:
    return load_smoke(config.smoke).prompts if config.smoke else ()


def _samples(recipe: Recipe) -> list[HeldOut]:
    from pipelines.heldout import read_heldout

    return [sample for path in _files(recipe) for sample in spread(read_heldout(path), recipe.chat.count)]


def _files(recipe: Recipe) -> list[Path]:
    if recipe.chat.prompts is None:
        return []
    path = resolve_path(recipe.chat.prompts)
    if not path.is_file():
        raise DataError(f"{path}: no such file. It is chat.prompts of recipe {recipe.name}; correct the path or make the file.")
    return [path]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Of the smoke test what it says counts; of the held-out questions the file's bytes; of `auto` what it means on this machine."""
    plain = recipe.chat.model_dump(mode="json", exclude={"chatter", "port", "prompts", "smoke", "start_timeout"})
    smoke = [prompt.model_dump(mode="json") for prompt in _smoke(recipe.chat)]
    return plain | chatters.facts(recipe.chat.chatter) | {"smoke": smoke}


STAGE = Stage(name="chat", version=2, run=run, settings=_settings, files=_files)
