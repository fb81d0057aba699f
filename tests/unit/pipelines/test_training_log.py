"""What is told of a training's log."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.stage import Work
from pipelines.training_log import message_of, relayed

HEAD = "[XTuner][RANK 0][2026-11-22 00:33:45]"


def step(number: int, total: int = 6) -> str:
    return (
        f"{HEAD}[INFO] Step {number}/{total} data_time: 0.0118 lr: 0.005000 time: 0.7468 text_tokens: 2033.0 total_loss: 5.558, "
        "reduced_llm_loss: 5.558 max_memory: 0.44 GB reserved_memory: 0.44 GB grad_norm: 2.264 tgs: 2722.4 e2e_tgs: 1587.6"
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{HEAD}[INFO] saved checkpoint step-5", "saved checkpoint step-5"),
        (f"{HEAD}[WARNING] slow disk", "warning: slow disk"),
        (f"{HEAD}[ERROR] no disk", "error: no disk"),
        ("W1122 00:47:54.1 16739 torch/distributed/elastic/agent/server/api.py:741] Received 15 ", "warning: Received 15"),
        (
            "E1122 00:47:54.1 16739 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 65)",
            "error: failed (exitcode: 65)",
        ),
        ("error: train.lr: not finite", "error: train.lr: not finite"),
        ("stopped after step 5 of 6; the same command continues from there.",) * 2,
        ("Loading weights: 100%|##########| 24/24 [00:00<00:00, 22514.72it/s]", None),
        ('  File "run.py", line 883, in main', None),
    ],
)
def test_a_line_is_told_with_its_level_or_only_in_the_file(line: str, told: str | None) -> None:
    assert message_of(line) == told


def numbers(lines: list[str]) -> list[str]:
    return [line.split(" ")[1] if line.startswith("Step ") else line for line in lines]


def watched(prepare_place: Callable[[], Work], lines: list[str], progress: list[tuple[float, str]]) -> Work:
    place = prepare_place()
    return Work(place.inputs, place.payload, place.record, place.scratch, place.cache, lines.append, lambda *told: progress.append(told))


def test_the_first_and_the_last_step_are_told_and_all_of_them_are_progress(prepare_place: Callable[[], Work]) -> None:
    lines: list[str] = []
    progress: list[tuple[float, str]] = []
    with relayed(watched(prepare_place, lines, progress), every=3600) as on_line:
        for line in (step(1), step(2), f"{HEAD}[INFO] saved checkpoint step-2", step(3), step(4), step(5), step(6)):
            on_line(line)
    assert numbers(lines) == ["1/6", "saved checkpoint step-2", "6/6"]
    assert [done for done, _ in progress] == [pytest.approx(number / 6) for number in range(1, 7)]
    assert progress[0][1] == "step 1 of 6, loss 5.558, 2722 tokens/s"
    assert progress[1][1] == "step 2 of 6, loss 5.558, 2722 tokens/s, 0:00:00 left"


def test_where_it_stood_is_told_when_it_stops_or_warns(prepare_place: Callable[[], Work]) -> None:
    lines: list[str] = []
    with relayed(watched(prepare_place, lines, []), every=3600) as on_line:
        for line in (step(1), step(2), step(3), f"{HEAD}[WARNING] left out step 3", step(4), step(5)):
            on_line(line)
    assert numbers(lines) == ["1/6", "3/6", "warning: left out step 3", "5/6"]


def test_every_few_seconds_a_step_is_told(prepare_place: Callable[[], Work]) -> None:
    lines: list[str] = []
    with relayed(watched(prepare_place, lines, []), every=0) as on_line:
        for number in range(1, 4):
            on_line(step(number))
    assert numbers(lines) == ["1/6", "2/6", "3/6"]
