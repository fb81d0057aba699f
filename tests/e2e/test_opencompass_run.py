"""The eval stage with the real OpenCompass on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate
from pipelines.evaluators import opencompass
from pipelines.recipe import EvalConfig, EvalDataset, Recipe, load_recipe
from pipelines.stage import Work
from xtuner_core.errors import DataError

pytestmark = pytest.mark.slow

QUESTIONS = (
    "Where is my parcel? It was due last week, and nobody answers the telephone.",
    "Braces are text: {answer} {question} {{0}} %s",
    "Zażółć gęślą jaźń 🙂\nsecond line",
    "Hi",
    " a space before and a line break after\n",
)


def _write(path: Path, answers: list[str]) -> EvalDataset:
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns), encoding="utf-8")
    return EvalDataset(name=path.stem, path=str(path), max_out_len=4 if path.stem == "few" else 8)


def _recipe(*datasets: EvalDataset) -> Recipe:
    config = EvalConfig.model_validate({"datasets": datasets, "batch_size": 2})
    return load_recipe("qwen3_tiny_full_openai").model_copy(update={"eval": config})


def _work(folder: Path, model: Path) -> Work:
    parts = {part: folder / part for part in ("payload", "record", "scratch", "cache")}
    for part in parts.values():
        part.mkdir(parents=True)
    return Work({"model": model.parent}, **parts, log=print)


def _scores(work: Work) -> dict[str, Any]:
    return json.loads((work.payload / "scores.json").read_text(encoding="utf-8"))["datasets"]


def test_the_model_s_own_answers_score_and_others_do_not(tmp_path: Path, tiny_model_folder: Path) -> None:
    first = _work(tmp_path / "first", tiny_model_folder)
    nobody_says = ["\u2603" * 40] * len(QUESTIONS)
    metrics = evaluate.run(_recipe(_write(tmp_path / "few.jsonl", nobody_says), _write(tmp_path / "more.jsonl", nobody_says)), first)
    assert metrics == {"scores": {"few": 0.0, "more": 0.0}}
    samples = {name: score["samples"] for name, score in _scores(first).items()}
    assert [sample["question"] for sample in samples["few"]] == list(QUESTIONS)
    assert [one["answer"] != two["answer"] for one, two in zip(samples["few"], samples["more"], strict=True)].count(True) >= 1

    answers = [sample["answer"] for sample in samples["more"]]
    second = _work(tmp_path / "second", tiny_model_folder)
    assert evaluate.run(_recipe(_write(tmp_path / "more.jsonl", [*answers[:3], "no", "no"])), second) == {"scores": {"more": 60.0}}
    assert [sample["answer"] for sample in _scores(second)["more"]["samples"]] == answers
    assert str(tmp_path) not in (second.payload / "scores.json").read_text(encoding="utf-8")
    assert [path.name for path in second.payload.iterdir()] == ["scores.json"]


def test_a_model_that_cannot_be_loaded_fails_loudly(tmp_path: Path, tiny_model_folder: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    work = _work(tmp_path / "work", broken)
    with pytest.raises(DataError, match=r"(?s)OpenCompass ended with exit status 1\. .*opencompass\.log:.*Safetensor"):
        evaluate.run(_recipe(_write(tmp_path / "few.jsonl", ["x"] * len(QUESTIONS))), work)
    assert not (work.payload / "scores.json").exists()


def test_a_hung_run_is_stopped(tmp_path: Path, tiny_model_folder: Path) -> None:
    dataset = _write(tmp_path / "few.jsonl", ["x"] * len(QUESTIONS))
    config = _recipe(dataset).eval.model_copy(update={"timeout": 1})
    with pytest.raises(DataError, match=r"did not finish within eval\.timeout = 1 s"):
        opencompass.evaluate(tiny_model_folder, [dataset], config, None, tmp_path, print)
    assert not (tmp_path / "scratch").exists()
