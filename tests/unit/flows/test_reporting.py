"""The page that Prefect shows."""

from __future__ import annotations

from collections.abc import Callable

from flows.reporting import data
from pipelines import prepare
from pipelines.recipe import load_recipe
from pipelines.stage import Work


def test_the_data_section_says_what_the_data_report_found(prepare_place: Callable[[], Work]) -> None:
    work = prepare_place()
    metrics = prepare.run(load_recipe("qwen3_tiny_full_openai"), work)
    told = data(work.record).splitlines()
    assert told[0] == f"- {metrics['lines']} lines, {metrics['accepted']} accepted, 0 rejected, 0 blank, 0 dropped"
    assert told[1].endswith(" near copies of earlier samples")
    assert told[2] == "- of 16 questions in heldout.jsonl, 0 stand in the data as a whole"
    assert told[-1] == f"- report: `{work.record / 'report.html'}`"
