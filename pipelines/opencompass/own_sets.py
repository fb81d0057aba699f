"""Data sets of the user's own files: how each question is put to OpenCompass, and whether that is what it asked and counted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluators import DatasetScore, Sample
from pipelines.heldout import HeldOut, read_heldout
from pipelines.opencompass.models import BASE, CHAT
from pipelines.opencompass.output import model_output, verdicts
from pipelines.opencompass.process import failure
from pipelines.questions import ChoiceQuestion, read_choices
from pipelines.recipe import EvalDataset
from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError

COLUMN, ANSWER = "held_out_{}", "held_out_answer"
"""OpenCompass also replaces `{column}` inside the questions, so columns have names that no question has."""
_SLACK = 1024
"""Tokens that a chat template may add, generously."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: what the model is given, and what is right.

    prompts: role (SYSTEM, HUMAN) → text; for kind ppl letter → text whose perplexity is compared.
    """

    question: str
    prompts: Mapping[str, str]
    gold: str
    place: str
    letters: str = ""
    """Of its choices, if it has any."""


def read(dataset: EvalDataset, limit: int | None) -> list[Asked]:
    """The data set's first `limit` questions (all if None).

    Raises:
        DataError: the file is unreadable, or a row cannot be asked; names file and line.
    """
    path = Path(str(dataset.path))
    if dataset.kind == "qa":
        found = list(_conversations(path, read_heldout(path)[:limit]))
    else:
        form = _multiple_choice if dataset.kind == "mcq" else _continuations
        found = [form(question) for question in read_choices(path)[:limit]]
    for asked in found:
        if asked.prompts.keys() != found[0].prompts.keys():
            why = "either all conversations of a file have a system message, or none" if dataset.kind == "qa" else _UNEVEN
            raise DataError(f"{asked.place}: {why}.")
    return found


_UNEVEN = "kind ppl needs as many choices in every question of a file; kind choice does not"


def _conversations(path: Path, samples: Sequence[HeldOut]) -> Iterator[Asked]:
    for sample in samples:
        prompts = {_ROLES[message["role"]]: message["content"] for message in sample.messages if message["role"] in _ROLES}
        if [message["role"] for message in sample.messages] not in (["user"], ["system", "user"]) or not prompts["HUMAN"]:
            roles = " + ".join(message["role"] for message in sample.messages)
            raise DataError(
                f"{path}:{sample.line}: evaluation asks one user message, behind a system message if there is one, and compares one "
                f"assistant message, but {roles} precede the answer. Put the rest into a non-empty user message, or remove it."
            )
        yield Asked(prompts["HUMAN"], prompts, sample.expected, f"{path}:{sample.line}")


_ROLES = {"system": "SYSTEM", "user": "HUMAN"}


def _multiple_choice(one: ChoiceQuestion) -> Asked:
    """In the words of OpenCompass' own sets (mmlu_gen)."""
    *letters, last = one.choices
    listed = "".join(f"\n{letter}. {text}" for letter, text in one.choices.items())
    told = f"There is a single choice question. Answer the question by replying {', '.join(letters)} or {last}."
    return Asked(
        one.question, {"HUMAN": f"{told}\nQuestion: {one.question}{listed}\nAnswer: "}, one.answer, one.place, "".join(one.choices)
    )


def _continuations(one: ChoiceQuestion) -> Asked:
    """A question in the words of OpenCompass' own sets (ARC_c_ppl); a text goes on after a space."""
    begin = f"Question: {one.question}\nAnswer: " if one.chat else f"{one.question.rstrip()} "
    return Asked(one.question, {letter: begin + text for letter, text in one.choices.items()}, one.answer, one.place)


def require_room(model_dir: Path, dataset: EvalDataset, questions: Sequence[Asked], context: int) -> None:
    """OpenCompass would cut what does not fit, and say nothing.

    Raises:
        DataError: a question, with the answer behind it, is longer than the model's context.
    """
    room = context - (dataset.max_out_len if dataset.kind != "ppl" else 0)
    if all(_most_tokens(asked) <= room for asked in questions):
        return
    from xtuner_core.data.own_template import own_tokenizer

    tokenizer = own_tokenizer(model_dir)
    for asked in questions:
        tokens = max(map(len, _ids(tokenizer, dataset.kind, asked)))
        if tokens > room:
            told = f"{tokens} tokens, and the model's context of {context} leaves {room} for a question. Shorten or remove it"
            raise DataError(f"{asked.place}: {told}, or lower max_out_len.")


def _most_tokens(asked: Asked) -> int:
    return sum(len(text.encode()) for text in asked.prompts.values()) + _SLACK


def _ids(tokenizer: Any, kind: str, asked: Asked) -> list[list[int]]:
    if kind == "ppl":
        return tokenizer(list(asked.prompts.values()))["input_ids"]
    names = {meant: role for role, meant in _ROLES.items()}
    messages = [{"role": names[role], "content": text} for role, text in asked.prompts.items()]
    return [tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)]


def model_of(dataset: EvalDataset) -> str:
    """Which form of the model is asked."""
    return BASE if dataset.kind == "ppl" else CHAT


def _order(questions: Sequence[Asked]) -> list[int]:
    """Indices by length: prompts of one batch are padded to its longest."""
    return sorted(range(len(questions)), key=lambda index: max(map(len, questions[index].prompts.values())))


def write(path: Path, questions: Sequence[Asked]) -> None:
    """One JSON object a line, in the order they are asked."""
    rows = [
        {**{COLUMN.format(key.lower()): text for key, text in questions[index].prompts.items()}, ANSWER: questions[index].gold}
        for index in _order(questions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def configure(dataset: EvalDataset, path: Path, questions: Sequence[Asked]) -> dict[str, Any]:
    """OpenCompass' description of a data set whose questions `write` put into `path`."""
    columns = {key: COLUMN.format(key.lower()) for key in questions[0].prompts}
    letters = max((asked.letters for asked in questions), key=len)
    extract = {"type": "opencompass.utils.text_postprocessors.first_option_postprocess", "options": letters}
    inferencer = {"type": "opencompass.openicl.GenInferencer", "max_out_len": dataset.max_out_len}
    return {
        "abbr": dataset.name,
        "type": "opencompass.datasets.CustomDataset",
        "path": str(path.resolve()),
        "reader_cfg": {"input_columns": list(columns.values()), "output_column": ANSWER},
        "infer_cfg": {
            "prompt_template": {"type": "opencompass.openicl.PromptTemplate", "template": _template(dataset.kind, columns)},
            "retriever": {"type": "opencompass.openicl.ZeroRetriever"},
            "inferencer": {"type": "opencompass.openicl.PPLInferencer"} if dataset.kind == "ppl" else inferencer,
        },
        "eval_cfg": {
            "evaluator": {"type": "opencompass.openicl.AccEvaluator"},
            **({"pred_postprocessor": extract} if dataset.kind == "mcq" else {}),
        },
    }


def _template(kind: str, columns: Mapping[str, str]) -> dict[str, Any]:
    slots = {key: f"{{{column}}}" for key, column in columns.items()}
    if kind == "ppl":
        return slots
    begin = {"begin": [{"role": "SYSTEM", "fallback_role": "HUMAN", "prompt": slots["SYSTEM"]}]} if "SYSTEM" in slots else {}
    return begin | {"round": [{"role": "HUMAN", "prompt": slots["HUMAN"]}, {"role": "BOT", "prompt": f"{{{ANSWER}}}"}]}


def score(work: Path, dataset: EvalDataset, questions: Sequence[Asked]) -> DatasetScore:
    """Believe a data set's result only if every question was asked as written and OpenCompass' accuracy is that of its answers.

    Raises:
        DataError: a file is missing or says something else; shows the end of the log.
    """
    predictions, results = model_output(work, model_of(dataset), dataset.name)
    if len(predictions) != len(questions):
        raise failure(work, f"answered {len(predictions)} of the {len(questions)} questions of {dataset.name}")
    extracted = [prediction["prediction"] for prediction in predictions]
    if dataset.kind == "mcq":
        extracted = [detail.get("predictions") for detail in verdicts(results, len(questions))]
    order = _order(questions)
    judged = {
        index: _judge(dataset.kind, questions[index], prediction, answer, work)
        for index, prediction, answer in zip(order, predictions, extracted, strict=True)
    }
    found = DatasetScore("accuracy", tuple(judged[index] for index in range(len(questions))))
    reported = results.get("accuracy")
    if not isinstance(reported, int | float) or abs(found.value - reported) > 1e-6:
        raise failure(work, f"reports accuracy {reported!r} for {dataset.name}, but its answers have {found.value}")
    return found


def _judge(kind: str, asked: Asked, prediction: Mapping[str, Any], extracted: Any, work: Path) -> Sample:
    if kind == "ppl":
        given = {letter: prediction.get(f"label: {letter}", {}) for letter in asked.prompts}
        seen = {letter: found.get("prompt") for letter, found in given.items()}
        if not all(math.isfinite(found.get("PPL", 0.0)) for found in given.values()):
            raise failure(work, f"found perplexities that are not finite ({asked.place})")
        lowest = min(given, key=lambda letter: given[letter].get("PPL", float("inf")))
        if extracted != lowest:
            raise failure(work, f"chose {extracted!r} where {lowest!r} has the lowest perplexity ({asked.place})")
    else:
        seen = {turn["role"]: turn["prompt"] for turn in prediction["origin_prompt"]}
    if (seen, prediction["gold"]) != (dict(asked.prompts), asked.gold):
        raise failure(work, f"changed the sample of {asked.place}: {dict(asked.prompts)!r} became {seen!r}")
    return Sample(asked.question, asked.gold, str(prediction["prediction"]), float(extracted == asked.gold))
