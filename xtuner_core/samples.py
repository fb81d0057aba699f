"""What the model answers on its way (`train.sample_prompts`), without a trace in the training that goes on.

A prompt is rendered as in training: a conversation up to the answer, by the template of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from xtuner_core.config import PROMPT_FILES, SftConfig
from xtuner_core.data import templates
from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.formats import openai
from xtuner_core.data.jsonl import Rejected, parse
from xtuner_core.data.render import find_template, renderer
from xtuner_core.data.tokenize import ChatTokenizer, encode, load_tokenizer
from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World
from xtuner_core.parallel.shard import give_back

ROWS = "samples.jsonl"
ANSWER = Message("assistant", "?", loss=True)
"""Stands where the model will write; what a template puts before it is part of the prompt."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is asked: messages for people, ids for the model, and the ids that end an answer."""

    asked: tuple[tuple[Message, ...], ...]
    ids: tuple[list[int], ...]
    ends: frozenset[int]
    tokenizer: ChatTokenizer


def read_prompts(config: SftConfig) -> Prompts | None:
    """The prompts in the form of the training data; None if there are none.

    Raises:
        RecipeError: a file is not there, or the run has no tokenizer.
        DataError: a line is no conversation, or the template refuses it.
    """
    if not config.train.sample_prompts:
        return None
    folder = config.tokenizer_dir or config.model_dir
    tokenizer, template = load_tokenizer(folder), PackedDataset(config.data_dir).description["template"]
    render = renderer(template, folder, tokenizer)
    asked, ids = [], []
    for place, messages in _asked(config.train.sample_prompts):
        try:
            [document] = encode(tokenizer, [list(render(Conversation((*messages, ANSWER))))])
        except Rejected as refusal:
            raise DataError(f"train.sample_prompts: {place}: {refusal}. Correct or remove it.") from None
        asked.append(messages)
        ids.append(document.ids[: int(document.loss.argmax())].tolist())  # up to the first token that is learned
    stops = {tokenizer.eos, None if template == templates.OWN else find_template(template).STOP}
    ends = frozenset(tokenizer.control[token] for token in stops if token in tokenizer.control)
    return Prompts(tuple(asked), tuple(ids), ends, tokenizer)


def _asked(prompts: tuple[str, ...]) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Where each prompt stands, and its messages without an answer at the end."""
    for prompt in prompts:
        if not prompt.endswith(PROMPT_FILES):
            yield repr(prompt), (Message("user", prompt),)
            continue
        for number, line in enumerate(_lines(Path(prompt).expanduser()), 1):
            if line.strip():
                place = f"{prompt}:{number}"
                yield place, (Message("user", line.strip()),) if prompt.endswith(".txt") else _messages(place, line)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"train.sample_prompts: {file}: {error}. A prompt that ends in {' or '.join(PROMPT_FILES)} is a file.") from None


def _messages(place: str, line: str) -> tuple[Message, ...]:
    """A line of chat data; an answer that it brings is left to the model."""
    try:
        value = parse(line.encode())
        entries = value.get("messages") if isinstance(value, dict) else value
        if isinstance(entries, list) and entries and entries[-1].get("role") == "assistant":
            entries = entries[:-1]
        conversation = openai.parse([*entries, {"role": "assistant", "content": ANSWER.content}] if isinstance(entries, list) else value)
    except (Rejected, AttributeError) as error:
        raise DataError(
            f"train.sample_prompts: {place}: {error}. Give OpenAI chat messages, or a .txt file with plain questions."
        ) from None
    return tuple(message._replace(loss=False) for message in conversation.messages[:-1])


def answer(model: PreTrainedModel, prompts: Prompts | None, step: int, last: bool, config: SftConfig, world: World) -> None:
    """After `step` steps, if it is time: print the model's answers and put them into `WORK_DIR/samples.jsonl`, once for a step.

    All ranks write the same answers, for a forward pass gathers the weights from all. Weights, random streams and the model's mode are
    afterwards what they were.
    """
    every = config.train.sample_interval
    if prompts is None or not (last or (every and step and step % every == 0)):
        return
    rows = []
    with speaking(model, config.train.compile):
        for asked, ids in zip(prompts.asked, prompts.ids, strict=True):
            found = greedy(model, ids, config.train.sample_tokens, prompts.ends, world.device)
            text = _text(prompts.tokenizer, [number for number in found if number not in prompts.ends])
            say(world.rank, f"Sample step {step} {asked[-1].content!r} -> {text!r}")
            told = {"messages": [message.as_dict() for message in asked], "answer": text}
            rows.append({"step": step, **told, "tokens": len(found), "ended": found[-1] in prompts.ends})
    if world.rank == 0:
        _write(config.work_dir / ROWS, step, rows)


@contextmanager
def speaking(model: PreTrainedModel, compiled: bool) -> Iterator[None]:
    """The model in evaluation mode, with attention that knows a cache; and back. Lengths that grow are not worth compiling for."""
    before = str(model.config._attn_implementation)
    model.eval()
    _attend(model)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train()
        give_back(model)


def _attend(model: PreTrainedModel) -> None:
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # gpt_oss: its sinks are beyond SDPA
        model.set_attn_implementation("eager")


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], most: int, ends: frozenset[int], device: torch.device) -> list[int]:
    """The likeliest token again and again, until one of `ends` (which is included) or `most` tokens.

    Rank 0's choice is everybody's: if two GPUs rounded otherwise, ranks would end after different numbers of passes and wait for each
    other.
    """
    found: list[int] = []
    cache, ids = None, torch.tensor([prompt], device=device)
    while len(found) < most and not (found and found[-1] in ends):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        if dist.is_initialized():
            dist.broadcast(ids, 0)
        found.append(int(ids))
    return found


def _text(tokenizer: ChatTokenizer, ids: Iterable[int]) -> str:
    """The text of the ids, control tokens by their name."""
    names = {number: token for token, number in tokenizer.control.items()}
    runs = ((name, list(run)) for name, run in groupby(ids, key=names.get))
    return "".join(tokenizer.plain.decode(run) if name is None else name * len(run) for name, run in runs)


def _write(file: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Add the rows; a run that was resumed comes to a step again."""
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    kept = [row for row in known if row["step"] < step]
    write_bytes(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows]).encode())
