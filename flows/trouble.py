"""What is wrong on a Prefect server: runs that failed, runs that nobody starts, schedules that make no runs, pools without a worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterId,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.sorting import FlowRunSort

LONGEST = 400
"""Characters of a run's message."""
WAITING = ["Scheduled", "Late", "Pending", "AwaitingRetry"]
"""States of a run that should begin at its time; one that waits for a free slot or for a person is not late."""


def failed_runs(client: SyncPrefectClient, since: datetime) -> dict[str, str]:
    """Runs that ended badly since then: cause → what happened. A subflow's failure is that of its parent."""
    chosen = FlowRunFilter(
        state=_types(StateType.FAILED, StateType.CRASHED),
        end_time=FlowRunFilterEndTime(after_=_moment(since)),
        parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True),
    )
    return {f"run {run.id}": _told(run) for run in client.read_flow_runs(flow_run_filter=chosen)}


def mended(client: SyncPrefectClient, causes: Iterable[str]) -> Iterator[str]:
    """Of the causes that `failed_runs` told those whose run, or a later one of the same deployment or flow, is completed."""
    ids = {UUID(cause.split()[1]): cause for cause in causes if cause.startswith("run ")}
    if not ids:
        return
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(ids)))):
        cause = ids.pop(run.id)
        if run.state_type == StateType.COMPLETED or _completed_after(client, run):
            yield cause
    yield from ids.values()  # deleted from the server


def _completed_after(client: SyncPrefectClient, run: FlowRun) -> bool:
    completed = FlowRunFilter(state=_types(StateType.COMPLETED), end_time=FlowRunFilterEndTime(after_=_moment(run.end_time or run.created)))
    if run.deployment_id:
        of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id]))
        return bool(client.read_flow_runs(flow_run_filter=completed, deployment_filter=of_deployment, limit=1))
    return bool(client.read_flow_runs(flow_run_filter=completed, flow_filter=FlowFilter(id=FlowFilterId(any_=[run.flow_id])), limit=1))


def late_runs(client: SyncPrefectClient, seconds: float) -> dict[str, str]:
    """Runs that should have begun so long ago."""
    due = _moment(datetime.now(UTC) - timedelta(seconds=seconds))
    chosen = FlowRunFilter(
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=WAITING)),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=due),
    )
    late = client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    names: dict[UUID | None, str] = {one.id: f"of deployment {one.name} " for one in client.read_deployments()} if late else {}
    return {
        f"late {run.id}": f"run {run.name} {names.get(run.deployment_id, '')}should have begun at {_at(run.next_scheduled_start_time)}"
        for run in late
    }


def barren_schedules(client: SyncPrefectClient) -> dict[str, str]:
    """Deployments whose schedule is active, but has no run to come: the server's scheduler does not work."""
    active = [one for one in client.read_deployments() if not one.paused and any(schedule.active for schedule in one.schedules)]
    return {
        f"schedule {one.id}": f"the schedule of deployment {one.name} has made no run to come; see the server's log" for one in active
        if not client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[one.id])),
            flow_run_filter=FlowRunFilter(state=_types(StateType.SCHEDULED)),
            limit=1,
        )
    }  # fmt: skip


def deserted_pools(client: SyncPrefectClient) -> dict[str, str]:
    """Work pools none of whose workers gives a sign of life; the server calls one offline after three heartbeats that it missed."""
    return {
        f"pool {pool.name}": f"no worker of work pool {pool.name} gives a sign of life; no run will begin"
        for pool in client.read_work_pools()
        if not pool.is_paused and not any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool.name))
    }


def _moment(time: datetime | None) -> Any:
    """Prefect's filters name a subclass of datetime, and take any."""
    return time


def _types(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def _told(run: FlowRun) -> str:
    state: Any = run.state
    message = "; ".join(line.strip() for line in (state.message or "no message").splitlines() if line.strip())
    return f"{run.name} {state.name.lower()}: {message if len(message) <= LONGEST else f'{message[:LONGEST]}…'}"


def _at(time: datetime | None) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if time else "a time that is over"
