"""Likelihoods against a plain forward pass of transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.evaluators import loss
from pipelines.evaluators.loss import evaluate
from pipelines.recipe import EvalConfig, EvalDataset
from xtuner_core import likelihood
from xtuner_core.errors import DataError, RecipeError

QUESTION = {"role": "user", "content": "Where is my parcel?"}
ANSWERS = ("In Oslo.", "It was lost on the way, we are sorry.", "é 你好")
TEXT = "The sun rises in the east"


@pytest.fixture(scope="module")
def model_dir(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in fp32, so that both sides agree to the last digits."""
    folder = tmp_path_factory.mktemp("fp32")
    AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def _set(folder: Path, name: str, kind: str, *rows: Any) -> EvalDataset:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return EvalDataset(name=name, kind=kind, path=str(path))


def _plain(model_dir: Path, text: str, before: str) -> tuple[float, int, int]:
    """Nats, tokens and hits of what `text` has behind `before`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    first = max(1, len(tokenizer(before, add_special_tokens=False).input_ids))
    with torch.no_grad():
        logits = model(ids).logits[0, first - 1 : -1].float()
    labels = ids[0, first:]
    return float(F.cross_entropy(logits, labels, reduction="sum")), len(labels), int((logits.argmax(-1) == labels).sum())


def test_losses_and_choices_are_those_of_transformers(tmp_path: Path, model_dir: Path) -> None:
    chats = [{"messages": [QUESTION, {"role": "assistant", "content": answer}]} for answer in ANSWERS]
    letters = dict(zip("ABC", ANSWERS, strict=True))
    sets = [
        _set(tmp_path, "chats", "loss", *chats),
        _set(tmp_path, "texts", "loss", {"text": TEXT}),
        _set(tmp_path, "asked", "choice", {"question": QUESTION["content"], **letters, "answer": "A"}),
        _set(tmp_path, "continued", "choice", *({"text": TEXT, **letters, "answer": letter} for letter in "ABC")),
    ]
    work = tmp_path / "work"
    work.mkdir()
    scores = evaluate(model_dir, sets, EvalConfig(), None, work, print)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = str(tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True))
    ended = [_plain(model_dir, f"{asked}{answer}<|im_end|>", asked) for answer in ANSWERS]
    assert [sample.score for sample in scores["chats"].samples] == pytest.approx([nats / tokens for nats, tokens, _ in ended], rel=1e-4)
    assert [sample.weight for sample in scores["chats"].samples] == [tokens for _, tokens, _ in ended]
    assert scores["chats"].value == pytest.approx(sum(one[0] for one in ended) / sum(one[1] for one in ended), rel=1e-4)
    assert scores["chats"].extras["token_accuracy"] == pytest.approx(100 * sum(one[2] for one in ended) / sum(one[1] for one in ended))
    assert scores["texts"].samples[0].score == pytest.approx((found := _plain(model_dir, TEXT, ""))[0] / found[1], rel=1e-4)

    for name, before, between in (("asked", asked, ""), ("continued", TEXT, " ")):
        costs = [_plain(model_dir, before + between + answer, before)[0] for answer in ANSWERS]
        likeliest = min(ANSWERS, key=lambda answer: costs[ANSWERS.index(answer)] / len(answer))
        assert {sample.answer for sample in scores[name].samples} == {likeliest}
        rows = [json.loads(line) for line in (work / "likelihoods.jsonl").read_text().splitlines()]
        assert rows[4 if name == "asked" else 5]["nats"] == pytest.approx(costs, rel=1e-4)
    assert scores["continued"].value == pytest.approx(100 / 3)


def _request(folder: Path, model_dir: Path, *rows: Any) -> dict[str, str]:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"place": f"set.jsonl:{place}"} | row) + "\n" for place, row in enumerate(rows, 1))
    )
    return {"model_dir": str(model_dir), "rows": str(folder / "rows.jsonl"), "result": str(folder / "result.jsonl")}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a b"}, {"text": "word " * 2000}], r"set\.jsonl:2: \d+ tokens, more than the model's context of 4096"),
        ([{"text": "x"}], r"set\.jsonl:1: has no token to measure"),
    ],
)
def test_what_cannot_be_measured_is_told(tmp_path: Path, model_dir: Path, rows: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        likelihood.run(_request(tmp_path, model_dir, *rows))
    assert not (tmp_path / "result.jsonl").exists()


def test_weights_that_are_not_finite_are_told(tmp_path: Path, model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="not finite"):
        likelihood.run(_request(tmp_path, tmp_path / "model", {"text": "a b"}))


def test_a_mistake_passes_from_the_process_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="transformers cannot load this model"):
        evaluate(tmp_path, [_set(tmp_path, "set", "loss", {"text": "a b"})], EvalConfig(), None, tmp_path, print)


def test_packing_rows_changes_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, model = likelihood.Reader(model_dir), likelihood.load(model_dir)
    rows = [reader.documents({"text": TEXT[:cut], "choices": list(ANSWERS)}) for cut in (3, 8, 15, 24)]
    alone = [likelihood.measure(model, [row])[0] for row in rows]
    monkeypatch.setattr(likelihood, "TOGETHER", sum(len(one.ids) for row in rows[:2] for one in row))
    batches = list(likelihood.together(rows))
    assert [len(batch) for batch in batches] != [1, 1, 1, 1]
    found = [result for batch in batches for result in likelihood.measure(model, batch)]
    for one, other in zip(found, alone, strict=True):
        assert one["nats"] == pytest.approx(other["nats"], rel=1e-4)
        assert (one["tokens"], one["hits"]) == (other["tokens"], other["hits"])


def test_a_hopeless_model_has_a_perplexity_that_json_can_hold() -> None:
    score = loss.loss_score([loss.Measured({}, "", "x", "x:1")], [{"nats": [9000.0], "tokens": [2], "hits": [0]}])
    assert score.value == 4500.0
    assert 1e300 < score.extras["perplexity"] < float("inf")


def test_the_length_of_a_choice_counts() -> None:
    question = loss.ChoiceQuestion("q", True, {"A": "ab", "B": "a" * 20}, "B", "x:1")
    score = loss.choice_score([question], [{"nats": [4.0, 20.0], "tokens": [1, 9], "hits": [0, 0]}])
    assert (score.value, score.extras, score.samples[0].answer) == (100.0, {"accuracy_unnormalised": 0.0}, "a" * 20)
