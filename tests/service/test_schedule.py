"""A schedule that really creates runs: with a wrong sqlalchemy Prefect's scheduler fails in silence, and nothing else shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.service import Service

pytestmark = pytest.mark.slow

FLOW = """
from pathlib import Path
from prefect import flow

@flow
def tick(file: str) -> None:
    Path(file).write_text("ran")
"""


def runs_of(deployment: Any) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment])))


def within(seconds: float, holds: Callable[[], Any]) -> Any:
    """What `holds` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def test_the_weekly_runs_are_planned(service: Service) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        weekly = client.read_deployment_by_name("finetune-flow/weekly")
    planned = within(60, lambda: [run for run in runs_of(weekly.id) if run.auto_scheduled])  # other tests start some by hand
    times = sorted(run.expected_start_time for run in planned)
    assert {(one.weekday(), one.hour, one.minute) for one in times} == {(0, 3, 0)}
    assert all(later - earlier == timedelta(days=7) for earlier, later in pairwise(times))
    assert all(run.parameters == weekly.parameters for run in planned)


def test_a_schedule_creates_runs_that_run(service: Service, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import IntervalSchedule

    (tmp_path / "ticking.py").write_text(FLOW)
    often = IntervalSchedule(interval=timedelta(seconds=10), anchor_date=datetime.now(UTC))  # pyright: ignore[reportArgumentType]
    with get_client(sync_client=True) as client:
        identity = client.create_deployment(
            client.create_flow_from_name("tick"),
            "ticking",
            entrypoint=f"{tmp_path / 'ticking.py'}:tick",
            parameters={"file": str(tmp_path / "ran")},
            work_pool_name="local",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}],  # else it copies the project
            schedules=[DeploymentScheduleCreate(schedule=often, active=True)],
        )
    try:
        within(60, lambda: runs_of(identity))
        within(120, (tmp_path / "ran").exists)
    finally:
        with get_client(sync_client=True) as client:
            client.delete_deployment(identity)
    assert (tmp_path / "ran").read_text() == "ran"
