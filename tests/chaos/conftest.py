"""A service of its own, which is killed part by part, and a store in which nobody disturbed anything."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import automations
from flows.service import Service, down, up
from pipelines.artifacts import Store
from pipelines.recipe import PROJECT
from tests.chaos.cells import RECIPE, Outcome, make_all
from tests.service.conftest import free_port
from xtuner_core.digest import library_version
from xtuner_core.durable import write_json

RESULTS = PROJECT / "benchmarks" / "results" / "chaos.json"
TABLE = pytest.StashKey[list[dict[str, Any]]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m chaos` (make chaos) only the cells for every day."""
    if "chaos" in config.option.markexpr:
        return
    whole = [item for item in items if item.get_closest_marker("chaos") and not item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in whole]
    config.hook.pytest_deselected(items=whole)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, Path]]]:
    """Server, worker and watcher, and what is made while nobody disturbs anything: node → its artifact.

    A run is lost after 45 s without a heartbeat (they come every 30), not after 90.
    """
    place = tmp_path_factory.mktemp("chaos")
    made = make_all(Store(place / "undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automations, "HEARTBEAT_SECONDS", 15)
        try:
            running = up(place / "home", place / "store", str(RECIPE), free_port())
            with temporary_settings({PREFECT_API_URL: running.api, PREFECT_HOME: place / "client"}):
                yield running, made
        finally:
            down(place / "home")


@pytest.fixture
def service(quiet: tuple[Service, dict[str, Path]]) -> Service:
    return quiet[0]


@pytest.fixture
def made(quiet: tuple[Service, dict[str, Path]]) -> dict[str, Path]:
    return quiet[1]


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[Outcome, str], None]:
    """Keep an outcome for the table at the end, and of the whole matrix in benchmarks/results/chaos.json."""

    def keep(outcome: Outcome, verdict: str) -> None:
        row = {**asdict(outcome), "verdict": verdict}
        request.config.stash.setdefault(TABLE, []).append(row)
        if "chaos" in request.config.option.markexpr:
            write_json(RESULTS, _with(row))

    return keep


def _with(row: dict[str, Any]) -> dict[str, Any]:
    told = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cells": []}
    row = {name: value for name, value in row.items() if name not in ("weights", "states")}
    others = [one for one in told["cells"] if (one["stage"], one["victim"]) != (row["stage"], row["victim"])]
    return {
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
        "versions": {name: library_version(name) for name in ("torch", "transformers", "prefect")} | {"python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
        "cells": [*others, row],
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each cell."""
    for row in config.stash.get(TABLE, []):
        resumed = f"resumed from {', '.join(map(str, row['resumed_from']))}" if row["resumed_from"] else ""
        terminalreporter.write_line(
            f"{row['stage']:<8} {row['victim']:<11} {row['by']:<20} {row['seconds']:6.1f} s  {resumed:<18} {row['verdict']}"
        )
