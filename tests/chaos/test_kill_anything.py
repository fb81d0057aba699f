"""kill -9 of anything, in any stage, under a real server and worker: the same run or the next one ends with the same weights.

Every day a few cells; all of them by `make chaos`, which prints a table and writes benchmarks/results/chaos.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.service import Service
from tests.chaos.cells import CELLS, NODES, SHORT, Outcome, Stage, Victim, run_cell, weights

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
ENDS_TRAINING = ("rank", "launcher", "supervisor", "flow")


@pytest.mark.parametrize(
    ("stage", "victim"), [pytest.param(*cell, marks=pytest.mark.slow if cell in SHORT else (), id=" ".join(cell)) for cell in CELLS]
)
def test_after_kill_9_the_work_is_finished_as_if_nothing_had_happened(
    stage: Stage, victim: Victim, service: Service, made: dict[str, Path], tmp_path: Path, note: Callable[[Outcome, str], None]
) -> None:
    found = run_cell(stage, victim, service, made, tmp_path)
    faults = []
    if found.left or found.unfinished:
        faults.append(f"left over: {found.left or found.unfinished}")
    if found.weights != weights(made["convert"]):
        faults.append("other weights")
    if again := [name for name in NODES[: NODES.index(stage)] if found.by != "the same process" and found.states.get(name) != "Cached"]:
        faults.append(f"made again: {again}")
    if stage == "train" and victim in ENDS_TRAINING and (not found.resumed_from or min(found.resumed_from) < found.killed_at_step > 0):
        faults.append(f"training began at {found.resumed_from}, not at step {found.killed_at_step}")
    note(found, "; ".join(faults) or "as undisturbed")
    assert not faults, found
