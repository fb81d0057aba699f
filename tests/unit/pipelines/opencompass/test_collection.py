"""OpenCompass' own data sets: which figure is told, and when its samples are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.opencompass import collection
from pipelines.opencompass.collection import Part
from pipelines.recipe import EvalDataset
from xtuner_core.errors import DataError, RecipeError

GENERATED = {"infer_cfg": {"inferencer": {"type": "opencompass.openicl.icl_inferencer.icl_gen_inferencer.GenInferencer"}}}


def _part(work: Path, abbr: str, answers: list[tuple[str, str]], results: dict[str, Any]) -> Part:
    rows = {index: {"origin_prompt": f"q{index}", "prediction": given, "gold": gold} for index, (given, gold) in enumerate(answers)}
    for kind, content in (("predictions", rows), ("results", results)):
        folder = work / "out" / "20260101_000000" / kind / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{abbr}.json").write_text(json.dumps(content))
    return Part("set", GENERATED | {"abbr": abbr}, len(answers))


def test_parts_count_alike_whatever_their_size(tmp_path: Path) -> None:
    small = _part(tmp_path, "small", [("1", "1")], {"accuracy": 100.0, "details": [{"pred": "1", "answer": "1", "correct": True}]})
    told = {str(index): {"predictions": given, "references": "1"} for index, given in enumerate("1000")}
    large = _part(tmp_path, "large", [(given, "1") for given in "1000"], {"accuracy": 25.0, "details": {"type": "GEN", **told}})
    score = collection.score(tmp_path, [small, large])
    assert (score.metric, score.value, score.extras) == ("accuracy", pytest.approx(62.5), {"small": 100.0, "large": 25.0})
    assert [sample.correct for sample in score.samples] == [True, True, False, False, False]


def test_runs_of_a_question_are_listed_by_some_scorers(tmp_path: Path) -> None:
    details = [{"pred": ["2.5"], "answer": ["72"], "correct": [False]}, {"pred": ["10"], "answer": ["10"], "correct": [True]}]
    score = collection.score(
        tmp_path, [_part(tmp_path, "one", [("2.5", "#### 72"), ("10", "#### 10")], {"accuracy": 50.0, "details": details})]
    )
    assert [sample.correct for sample in score.samples] == [False, True]


@pytest.mark.parametrize(
    "results",
    [
        {"rouge1": 40.0, "rouge2": 20.0},
        {"rouge1": 40.0, "details": [{"correct": True}, {"correct": False}]},
    ],
)
def test_a_figure_that_is_no_share_of_answers_has_no_samples(tmp_path: Path, results: dict[str, Any]) -> None:
    score = collection.score(tmp_path, [_part(tmp_path, "one", [("a", "b"), ("c", "d")], results)])
    assert (score.metric, score.value, score.samples) == ("rouge1", 40.0, ())


def test_details_that_contradict_the_figure_are_not_told(tmp_path: Path) -> None:
    results = {"accuracy": 90.0, "details": [{"correct": True}, {"correct": False}]}
    score = collection.score(tmp_path, [_part(tmp_path, "one", [("a", "a"), ("c", "d")], results)])
    assert (score.value, score.samples) == (90.0, ())


def test_missing_answers_and_figures_fail(tmp_path: Path) -> None:
    part = _part(tmp_path, "one", [("a", "a")], {"accuracy": 100.0})
    with pytest.raises(DataError, match="answered 1 of the 2 questions of one"):
        collection.score(tmp_path, [Part("set", part.config, 2)])
    with pytest.raises(DataError, match=r"reports no figure for one: .*'error'"):
        collection.score(tmp_path, [_part(tmp_path, "one", [("a", "a")], {"error": "boom"})])


def test_the_data_lies_in_one_folder() -> None:
    sets = [EvalDataset(name=name, kind="collection", path=path) for name, path in (("gsm8k_gen", "/a"), ("mmlu_gen", "/b"))]
    assert collection.data_folder(sets[:1]) == Path("/a")
    with pytest.raises(RecipeError, match="must lie in one folder, not in /a and /b"):
        collection.data_folder(sets)
