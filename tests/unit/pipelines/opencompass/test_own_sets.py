"""Questions of the user's files without OpenCompass: what goes in, and what is believed of what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.chatters import Endpoint
from pipelines.evaluators import opencompass
from pipelines.opencompass import models, own_sets
from pipelines.opencompass.own_sets import Asked
from pipelines.recipe import EvalDataset
from xtuner_core.errors import DataError

USER, ANSWER = {"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "shipping"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHOICE = {"question": "Which is hot?", "A": "ice", "B": "fire", "answer": "B"}
TICKETS = EvalDataset(name="tickets", path="x")
SAMPLES = [
    Asked("A long question, asked second.", {"HUMAN": "A long question, asked second."}, "billing", "x.jsonl:1"),
    Asked("A short one.", {"HUMAN": "A short one."}, "shipping", "x.jsonl:2"),
]


def _dataset(folder: Path, kind: str, *rows: Any) -> EvalDataset:
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return EvalDataset(name="tickets", kind=kind, path=str(path))


def test_a_system_message_stands_before_every_question_or_before_none(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, "qa", [SYSTEM, USER, ANSWER])
    asked = own_sets.read(dataset, None)
    own_sets.write(tmp_path / "questions.jsonl", asked)
    written = {"held_out_system": "Be brief.", "held_out_human": USER["content"], "held_out_answer": ANSWER["content"]}
    assert json.loads((tmp_path / "questions.jsonl").read_text()) == written
    reader = own_sets.configure(dataset, tmp_path / "questions.jsonl", asked)["reader_cfg"]
    assert {*reader["input_columns"], reader["output_column"]} == written.keys()
    with pytest.raises(DataError, match=r"heldout\.jsonl:2: either all conversations"):
        own_sets.read(_dataset(tmp_path, "qa", [SYSTEM, USER, ANSWER], [USER, ANSWER]), None)


@pytest.mark.parametrize("row", [[USER, ANSWER, USER, ANSWER], [{"role": "user", "content": ""}, ANSWER]])
def test_only_one_question_and_one_answer_can_be_judged(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"heldout\.jsonl:2: .*one user message"):
        own_sets.read(_dataset(tmp_path, "qa", [USER, ANSWER], row), None)


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    for kind, row in (("qa", [USER, ANSWER]), ("mcq", CHOICE), ("ppl", CHOICE)):
        taken = own_sets.read(_dataset(tmp_path, kind, row, row, row), 2)
        assert [asked.place.rpartition(":")[2] for asked in taken] == ["1", "2"]


def test_choices_are_put_in_the_words_of_opencompass_s_own_sets(tmp_path: Path) -> None:
    (asked,) = own_sets.read(_dataset(tmp_path, "mcq", CHOICE), None)
    told = "There is a single choice question. Answer the question by replying A or B."
    assert (asked.prompts, asked.gold) == ({"HUMAN": f"{told}\nQuestion: Which is hot?\nA. ice\nB. fire\nAnswer: "}, "B")
    five = CHOICE | {"C": "air", "D": "sand", "E": "milk"}
    dataset = _dataset(tmp_path, "mcq", CHOICE, five)
    extract = own_sets.configure(dataset, tmp_path, own_sets.read(dataset, None))["eval_cfg"]["pred_postprocessor"]
    assert extract["options"] == "ABCDE"  # a letter that is not among them is overlooked, and another one found
    text = {"text": "The sun is ", "A": "cold", "B": "hot", "answer": "B"}
    question, continued = own_sets.read(_dataset(tmp_path, "ppl", CHOICE, text), None)
    assert question.prompts == {"A": "Question: Which is hot?\nAnswer: ice", "B": "Question: Which is hot?\nAnswer: fire"}
    assert continued.prompts == {"A": "The sun is cold", "B": "The sun is hot"}
    with pytest.raises(DataError, match=r"heldout\.jsonl:2: kind ppl needs as many choices in every question"):
        own_sets.read(_dataset(tmp_path, "ppl", CHOICE, CHOICE | {"C": "air"}), None)


@pytest.mark.parametrize(("kind", "most"), [("qa", 4096 - 16), ("ppl", 4096)])
def test_what_the_model_s_context_cannot_hold_is_told(tmp_path: Path, tiny_model_folder: Path, kind: str, most: int) -> None:
    text = "word " * 819
    row = [{"role": "user", "content": text}, ANSWER] if kind == "qa" else CHOICE | {"question": text}
    dataset = _dataset(tmp_path, kind, [USER, ANSWER] if kind == "qa" else CHOICE, row)
    asked = own_sets.read(dataset, None)
    with pytest.raises(DataError, match=rf"heldout\.jsonl:2: \d+ tokens, and the model's context of 4096 leaves {most} for a question"):
        own_sets.require_room(tiny_model_folder, dataset, asked, 4096)
    own_sets.require_room(tiny_model_folder, dataset, asked, 4400)


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json: .*Hugging Face"):
        models.context_length(tmp_path)


def test_no_code_of_the_model_folder_may_run(tmp_path: Path, tiny_model_folder: Path) -> None:
    described = {models.CHAT: [{"abbr": "a"}], models.BASE: [{"abbr": "b"}]}
    for model in opencompass.experiment(tmp_path, None, described, 128, 16, tmp_path)["models"]:
        assert model["model_kwargs"]["trust_remote_code"] is False
        assert model["tokenizer_kwargs"]["trust_remote_code"] is False
        assert model["max_seq_len"] == 128  # if it were None, OpenCompass would read it with remote code allowed
    folder = models.bare_tokenizer(tiny_model_folder, tmp_path / "tokenizer")  # its client for servers allows it, too
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()


def test_the_model_is_judged_in_the_precision_it_was_exported_in(tmp_path: Path) -> None:
    for form in (models.CHAT, models.BASE):
        assert models.in_process(form, tmp_path, 128, 1)["model_kwargs"]["torch_dtype"] == "auto"


def test_a_server_is_asked_greedily_also_where_the_model_s_path_looks_like_a_reasoning_model(tmp_path: Path) -> None:
    model = models.served(Endpoint("http://127.0.0.1:1/v1", "/home/leo1/model"), tmp_path, 128, 1)
    assert model["temperature"] == model["openai_extra_kwargs"]["temperature"] == 0.0


def _prediction(question: str, gold: str, answer: str) -> dict[str, Any]:
    return {"origin_prompt": [{"role": "HUMAN", "prompt": question}], "prediction": answer, "gold": gold}


def _outputs(work: Path, predictions: list[dict[str, Any]], results: Any, model: str = models.CHAT) -> None:
    """What a run leaves, in the order of the questions' length."""
    run = work / "out" / "20260101_000000"
    for kind, content in (("predictions", dict(enumerate(predictions))), ("results", results)):
        folder = run / kind / model
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "tickets.json").write_text(json.dumps(content))
    (work / "opencompass.log").write_text("RuntimeError: the reason\n")


RIGHT = [_prediction("A short one.", "shipping", "shipping"), _prediction("A long question, asked second.", "billing", "billing.")]


def test_samples_come_back_in_the_order_of_the_file(tmp_path: Path) -> None:
    _outputs(tmp_path, RIGHT, {"accuracy": 50.0})
    score = own_sets.score(tmp_path, TICKETS, SAMPLES)
    assert [(sample.expected, sample.answer, sample.correct) for sample in score.samples] == [
        ("billing", "billing.", False),
        ("shipping", "shipping", True),
    ]
    assert (score.metric, score.value) == ("accuracy", 50.0)


@pytest.mark.parametrize(
    ("predictions", "results", "reason"),
    [
        (RIGHT, None, "left no results for tickets"),
        (RIGHT[:1], {"accuracy": 100.0}, "answered 1 of the 2 questions"),
        (RIGHT, {"error": "different length"}, "reports accuracy None"),
        (RIGHT, {"accuracy": "-"}, "reports accuracy '-'"),
        (RIGHT, {"accuracy": 100.0}, "reports accuracy 100.0 for tickets, but its answers have 50.0"),
        ([_prediction("A short one.\n", "shipping", "shipping"), RIGHT[1]], {"accuracy": 50.0}, "changed the sample of x.jsonl:2"),
        ([RIGHT[0], RIGHT[1] | {"gold": "refund"}], {"accuracy": 50.0}, "changed the sample of x.jsonl:1"),
    ],
)
def test_what_was_not_asked_or_does_not_add_up_is_not_believed(tmp_path: Path, predictions: Any, results: Any, reason: str) -> None:
    _outputs(tmp_path, predictions, results)
    with pytest.raises(DataError) as caught:
        own_sets.score(tmp_path, TICKETS, SAMPLES)
    assert reason in str(caught.value)
    assert "RuntimeError: the reason" in str(caught.value)


def test_a_letter_counts_as_opencompass_extracted_it(tmp_path: Path) -> None:
    asked = [Asked("hot?", {"HUMAN": "Which is hot?"}, "B", "x.jsonl:1")]
    dataset = EvalDataset(name="tickets", kind="mcq", path="x")
    prediction = _prediction("Which is hot?", "B", "The answer is B.")
    _outputs(tmp_path / "one", [prediction], {"accuracy": 100.0, "details": {"type": "GEN", "0": {"predictions": "B", "references": "B"}}})
    score = own_sets.score(tmp_path / "one", dataset, asked)
    assert (score.samples[0].answer, score.samples[0].correct) == ("The answer is B.", True)
    _outputs(tmp_path / "two", [prediction], {"accuracy": 100.0})
    with pytest.raises(DataError, match=r"reports accuracy 100\.0 for tickets, but its answers have 0\.0"):
        own_sets.score(tmp_path / "two", dataset, asked)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"prediction": "A"}, "chose 'A' where 'B' has the lowest perplexity"),
        ({"label: A": {"prompt": "other", "PPL": 9.0}}, "changed the sample"),
        ({"label: A": {"prompt": "It is ice"}}, None),
        ({"label: A": {"prompt": "It is ice", "PPL": float("nan")}}, "perplexities that are not finite"),
    ],
)
def test_perplexities_must_lead_to_the_choice(tmp_path: Path, change: dict[str, Any], reason: str | None) -> None:
    asked = [Asked("It is", {"A": "It is ice", "B": "It is fire"}, "B", "x.jsonl:1")]
    labels = {"label: A": {"prompt": "It is ice", "PPL": 7.5}, "label: B": {"prompt": "It is fire", "PPL": 2.5}}
    _outputs(tmp_path, [{**labels, "prediction": "B", "gold": "B"} | change], {"accuracy": 100.0}, models.BASE)
    dataset = EvalDataset(name="tickets", kind="ppl", path="x")
    if reason is None:
        assert own_sets.score(tmp_path, dataset, asked).value == 100.0
    else:
        with pytest.raises(DataError, match=reason):
            own_sets.score(tmp_path, dataset, asked)
