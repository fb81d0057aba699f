"""The page that Prefect shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.reporting.sections import _answer, _smoke_answer, data
from pipelines import prepare
from pipelines.artifacts import Artifact, Store
from pipelines.recipe import load_recipe
from pipelines.stage import Work


@pytest.mark.parametrize("tell", [_answer, _smoke_answer])
def test_no_answer_becomes_markup_on_the_page(tell: Callable[[dict[str, Any]], str]) -> None:
    evil = "**b** <img src=x>\n# ![pixel](http://there/x.png)\x1b[31m"
    answer = {"messages": [{"content": evil}], "answer": evil, "expected": evil, "failures": [evil], "correct": False}
    line = tell(answer)
    assert not set("\n\x1b") & set(line)
    assert all(line.count(mark) == line.count("\\" + mark) == 3 for mark in "<!#"), line
    assert "(nothing)" in tell({**answer, "answer": " \n"})


def test_the_data_section_says_what_the_data_report_found(prepare_place: Callable[[], Work], tmp_path: Path) -> None:
    work = prepare_place()
    (tmp_path / "record").symlink_to(work.record)
    metrics = prepare.run(load_recipe("qwen3_tiny_full_openai"), work)
    told = data(Artifact(tmp_path)).splitlines()[2:]
    assert told[0] == f"- {metrics['lines']} lines, {metrics['accepted']} accepted, 0 rejected, 0 blank, 0 dropped"
    assert told[1].endswith(" near copies of earlier samples")
    assert told[2] == "- of 16 questions in heldout.jsonl, 0 stand in the data as a whole"
    assert told[-1] == f"- report: `{tmp_path / 'record' / 'report.html'}`"


def test_an_api_that_is_away_and_a_page_that_cannot_be_made_cost_nothing(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from uuid import uuid4

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.reporting.board import Board

    recipe = load_recipe("qwen3_tiny_full_openai")
    nobody = SyncPrefectClient("http://127.0.0.1:1/api")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), nobody as client, ThreadPoolExecutor(1) as sender:
        shown = Board(recipe, Store(tmp_path), uuid4(), client, sender)
        shown._show("stages", "table", list)
        shown._show("report", "markdown", lambda: 1 / 0)
    assert [sent.exception() for sent in shown.unsent.values()] == [None, None]
    assert shown.ids == {}


def test_keys_take_small_letters_digits_and_dashes() -> None:
    from flows.reporting.board import slug

    assert slug("Qwen3_tiny.v2--Ä 1") == "qwen3-tiny-v2-1"
