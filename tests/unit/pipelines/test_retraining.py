"""Which files count whole and which are replayed; what the first run of a recipe is compared with. (Runs: tests/e2e/test_retraining.py)"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts import Store
from pipelines.pipeline import check
from pipelines.recipe import load_recipe
from pipelines.retraining import beginning, news, nothing_new, recipe_of_today, split
from xtuner_core.config import DataConfig, Source
from xtuner_core.data.prepare import Input, inputs_of
from xtuner_core.errors import DataError

WEEKLY = "smollm2_135m_instruct_lora_tickets_weekly"
DATA = DataConfig.model_validate({"train": "a.jsonl"})
INPUTS = st.lists(
    st.tuples(st.integers(0, 50), st.sampled_from(["auto", "openai", "alpaca"]), st.floats(0.01, 4), st.booleans()),
    unique_by=lambda one: one[0],
)


@given(INPUTS, st.floats(0, 1, allow_subnormal=False), st.integers(0, 9))
def test_new_files_count_whole_and_old_ones_by_the_replayed_share(
    files: list[tuple[int, str, float, bool]], replay: float, draw: int
) -> None:
    inputs = [Input(Path(f"/data/{number}.jsonl"), form, ratio, False) for number, form, ratio, _ in files]
    old = [seen for *_, seen in files]
    sources = {source.path: source for source in split(inputs, old, replay, draw, DATA)}
    assert list(sources) == [str(one.file) for one, seen in zip(inputs, old, strict=True) if replay or not seen]
    for one, seen in zip(inputs, old, strict=True):
        if str(one.file) in sources:
            source = sources[str(one.file)]
            assert source.sample_ratio == pytest.approx(one.sample_ratio * (replay if seen else 1))
            assert (source.format or DATA.format, source.draw) == (one.format, draw if seen else 0)


@given(INPUTS)
def test_without_old_files_the_split_says_what_the_recipe_said(files: list[tuple[int, str, float, bool]]) -> None:
    inputs = [Input(Path(f"/data/{number}.jsonl"), form, ratio, False) for number, form, ratio, _ in files]
    split_up = split(inputs, [False] * len(inputs), 0.2, 3, DATA)
    assert [(s.path, s.format or DATA.format, s.sample_ratio, s.draw) for s in split_up] == [
        (str(one.file), one.format, one.sample_ratio, 0) for one in inputs
    ]


def test_a_split_names_files_that_look_like_patterns(tmp_path: Path) -> None:
    odd = tmp_path / "week[1].jsonl"
    odd.write_text("")
    inputs = inputs_of(DATA.model_copy(update={"train": (Source(path=str(tmp_path)),)}))
    sources = split(inputs, [True], 0.5, 1, DATA)
    assert [one.file for one in inputs_of(DATA.model_copy(update={"train": sources}))] == [odd]


def test_the_first_run_begins_at_the_base_and_has_nothing_to_be_better_than(tmp_path: Path) -> None:
    store, written = Store(tmp_path / "store"), load_recipe(WEEKLY)
    today = recipe_of_today(WEEKLY, [], store)
    check(today)
    assert (today.data, today.train, today.eval.production) == (written.data, written.train, None)
    assert [rule.against for rule in today.eval.gate] == ["base", "base"] and len(written.eval.gate) == 3
    assert beginning(written, store).why == "training begins at the base model: no version of tickets is in production yet"
    assert news(today, store) is None and nothing_new(today, store) is None


def test_a_start_that_is_no_checkpoint_is_told_before_the_first_stage(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"train\.start .*/empty: no checkpoint\.json is there\. Name payload/checkpoint"):
        check(load_recipe("qwen3_tiny_full_openai", [f"train.start={tmp_path / 'empty'}"]))
