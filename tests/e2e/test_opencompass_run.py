"""The eval stage with the real OpenCompass on a tiny random model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines import chatters, evaluate
from pipelines.chatters import Request
from pipelines.environments import ensure
from pipelines.evaluators import opencompass
from pipelines.opencompass import collection
from pipelines.recipe import EvalConfig, EvalDataset, Recipe, load_recipe
from pipelines.stage import Work
from xtuner_core.errors import DataError, RecipeError

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


CHOICES = [
    {"question": "Which animal barks?", "A": "a dog", "B": "braces {A} {held_out_b} %s", "C": "a fish", "answer": "A"},
    {"question": "Zażółć 🙂?", "A": "tak", "B": "nie", "C": "może", "answer": "C"},
    {"question": "Hot?", "A": "ice", "B": "fire\nand smoke", "C": " snow", "answer": "B"},
]
STEMS = [("Which is a fruit?", ["apple", "stone", "car", "lamp"], "A"), ("Which can fly?", ["rock", "bird", "shoe", "lamp"], "B")]


def _choices(path: Path, kind: str) -> EvalDataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in CHOICES), encoding="utf-8")
    return EvalDataset(name=path.stem, kind=kind, path=str(path), max_out_len=8)


def _collection(folder: Path) -> EvalDataset:
    """Two questions in the form and at the place where OpenCompass looks for ARC-Challenge."""
    file = folder / "data" / "ARC" / "ARC-c" / "ARC-Challenge-Dev.jsonl"
    file.parent.mkdir(parents=True)
    rows = [
        {"question": {"stem": stem, "choices": [{"text": t, "label": n} for t, n in zip(texts, "ABCD", strict=True)]}, "answerKey": answer}
        for stem, texts, answer in STEMS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return EvalDataset(name="ARC_c_ppl", kind="collection", path=str(folder))


def test_all_kinds_are_asked_in_one_run_and_the_model_s_own_answers_score(tmp_path: Path, tiny_model_folder: Path) -> None:
    first = _work(tmp_path / "first", tiny_model_folder)
    nobody_says = ["\u2603" * 40] * len(QUESTIONS)
    own = [_write(tmp_path / f"{name}.jsonl", nobody_says) for name in ("few", "more")]
    choices = [_choices(tmp_path / f"{kind}.jsonl", kind) for kind in ("mcq", "ppl")]
    metrics = evaluate.run(_recipe(*own, *choices, _collection(tmp_path / "opencompass")), first)
    scores = _scores(first)
    samples = {name: score["samples"] for name, score in scores.items()}
    assert len(list((first.record / "opencompass" / "out").iterdir())) == 1
    assert (metrics["scores"]["few"], metrics["scores"]["more"]) == (0.0, 0.0)
    assert [sample["question"] for sample in samples["few"]] == list(QUESTIONS)
    assert [one["answer"] != two["answer"] for one, two in zip(samples["few"], samples["more"], strict=True)].count(True) >= 1
    for name in ("mcq", "ppl"):
        assert [(one["question"], one["expected"]) for one in samples[name]] == [(row["question"], row["answer"]) for row in CHOICES]
        assert metrics["scores"][name] == pytest.approx(100 * sum(one["score"] for one in samples[name]) / 3)
    assert {one["answer"] for one in samples["ppl"]} <= {"A", "B", "C"}
    assert [one["expected"] for one in samples["ARC_c_ppl"]] == ["A", "B"]
    assert all(stem in one["question"] for (stem, _, _), one in zip(STEMS, samples["ARC_c_ppl"], strict=True))

    answers = [sample["answer"] for sample in samples["more"]]
    second = _work(tmp_path / "second", tiny_model_folder)
    assert evaluate.run(_recipe(_write(tmp_path / "more.jsonl", [*answers[:3], "no", "no"])), second) == {"scores": {"more": 60.0}}
    assert [sample["answer"] for sample in _scores(second)["more"]["samples"]] == answers
    assert str(tmp_path) not in (second.payload / "scores.json").read_text(encoding="utf-8")
    assert [path.name for path in second.payload.iterdir()] == ["scores.json"]


def test_a_served_model_is_asked_by_its_url(tmp_path: Path, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    datasets = (_write(tmp_path / "few.jsonl", ["x"] * len(QUESTIONS)), _choices(tmp_path / "mcq.jsonl", "mcq"))
    recipe = _recipe(*datasets)
    server = chatters.choose("transformers").serve(Request(smollm2_folder), tmp_path / "server.log", print)
    work = _work(tmp_path / "work", smollm2_folder)
    with server as endpoint:
        config = recipe.eval.model_copy(update={"engine": f"{endpoint.base_url}#{endpoint.model}", "limit": 3})
        metrics = evaluate.run(recipe.model_copy(update={"eval": config}), work)
    assert metrics["scores"].keys() == {"few", "mcq"}
    samples = {name: score["samples"] for name, score in _scores(work).items()}
    assert [sample["question"] for sample in samples["few"]] == list(QUESTIONS[:3])
    assert all(sample["answer"] for sample in samples["few"])
    assert {sample["expected"] for sample in samples["mcq"]} == {"A", "B", "C"}
    assert "POST /v1/chat/completions" in (tmp_path / "server.log").read_text()
    kept = [path for path in work.record.rglob("*") if path.is_file() and path.suffix in (".json", ".log", ".py")]
    assert kept and not any("sesame" in path.read_text(encoding="utf-8", errors="replace") for path in kept)


def test_a_data_set_whose_data_is_not_there(tmp_path: Path) -> None:
    python = ensure("opencompass", print)

    def resolve(name: str) -> None:
        collection.resolve(python, [name], None, tmp_path, tmp_path, 300, print)

    with pytest.raises(DataError, match=rf"data set gsm8k_gen: its data is not at {tmp_path}/\./data/gsm8k.*nothing is downloaded"):
        resolve("gsm8k_gen")


CONFIGURATION = """
from opencompass.datasets import CustomDataset

def _set(file, **more):
    return dict(type=CustomDataset, path=file, reader_cfg=dict(input_columns=["question"], output_column="answer"), **more)

def _some_datasets():
    return []

{lists}
"""


LISTS = {
    "twice": 'one_datasets = [_set("two.jsonl", abbr="one")]\nall_datasets = [*one_datasets, _set("two.jsonl", abbr="more")]',
    "nameless": 'x_datasets = [_set("two.jsonl")]',
    "nothing": "sets = []",
    "empty": 'x_datasets = [_set("none.jsonl", abbr="none")]',
}
ASK = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("resolve", {str(collection.RESOLVE)!r})
resolve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resolve)
for name in {["gsm8k_gen_x", *LISTS]}:
    resolve.CONFIGS = pathlib.Path.cwd() if name != "gsm8k_gen_x" else resolve.CONFIGS
    pathlib.Path("names.json").write_text('{{"names": ["%s"], "limit": null}}' % name)
    sys.argv = ["resolve.py", "names.json", name + ".json"]
    resolve.main()
"""


def test_a_configuration_s_sets_are_asked_once_each_and_all_have_names_and_what_is_lacking_is_told(tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    (tmp_path / "none.jsonl").write_text("")
    for name, lists in LISTS.items():
        (tmp_path / f"{name}.py").write_text(CONFIGURATION.replace("{lists}", lists))
    subprocess.run([ensure("opencompass", print), "-P", "-c", ASK], cwd=tmp_path, check=True, timeout=300)
    told = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gsm8k_gen_x", *LISTS)}
    lacking = collection._complaint(told["gsm8k_gen_x"]["problem"], tmp_path)
    assert isinstance(lacking, RecipeError)
    assert re.search(r"data set gsm8k_gen_x: OpenCompass has no configuration .* gsm8k_gen", str(lacking))
    sets = {name: [(part["config"]["abbr"], part["size"]) for part in told[name]["sets"][name]] for name in ("twice", "nameless")}
    assert sets == {"twice": [("one", 2), ("more", 2)], "nameless": [("two.jsonl", 2)]}
    assert told["nothing"]["problem"] == {"name": "nothing", "reason": "its configuration describes no data set"}
    assert told["empty"]["problem"] == {"name": "empty", "reason": "none holds no sample"}


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
