"""The rules that `xtuner up` installs, on the real server: runs whose states a test sets, in a pool that nobody serves meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flows.service import Service

pytestmark = pytest.mark.slow


@pytest.fixture
def run(service: Service) -> Iterator[UUID]:
    """A run of the deployment that no worker takes."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.utilities.asyncutils import run_coro_as_sync

    async def pause(paused: bool) -> None:
        async with get_client() as client:
            await client.update_work_pool("local", WorkPoolUpdate(is_paused=paused))

    run_coro_as_sync(pause(True))
    with get_client(sync_client=True) as client:
        created = client.create_flow_run_from_deployment(client.read_deployment_by_name("finetune-flow/finetune-flow").id).id
    yield created
    with get_client(sync_client=True) as client:
        client.delete_flow_run(created)
    run_coro_as_sync(pause(False))


def _set(run: UUID, state: Any) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state, force=True)


def _state(run: UUID) -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
    return state.name if state else ""


def _becomes(run: UUID, name: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _state(run) != name:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


def test_a_crashed_run_gets_three_attempts(run: UUID) -> None:
    from prefect.states import Crashed, Running

    for _ in range(2):
        _set(run, Running())
        _set(run, Crashed())
        assert _becomes(run, "AwaitingRetry", 60)
    _set(run, Running())
    _set(run, Crashed())
    assert not _becomes(run, "AwaitingRetry", 5)
    assert _state(run) == "Crashed"


def test_a_run_that_gives_no_more_sign_of_life_is_crashed_and_goes_on(run: UUID) -> None:
    """By the rule with less patience, beside the installed one."""
    from prefect.client.orchestration import get_client
    from prefect.events import emit_event
    from prefect.states import Running
    from prefect.utilities.asyncutils import run_coro_as_sync

    from flows.automations import crashed_if_silent

    rule = crashed_if_silent("heartbeat", timedelta(seconds=10))
    rule.name = "impatient"

    async def install() -> UUID:
        async with get_client() as client:
            return await client.create_automation(rule)

    async def remove(identity: UUID) -> None:
        async with get_client() as client:
            await client.delete_automation(identity)

    impatient = run_coro_as_sync(install())
    try:
        _set(run, Running())
        with get_client(sync_client=True) as client:
            deployment = client.read_flow_run(run).deployment_id
        emit_event(
            "prefect.flow-run.heartbeat",
            resource={"prefect.resource.id": f"prefect.flow-run.{run}"},
            related=[{"prefect.resource.id": f"prefect.deployment.{deployment}", "prefect.resource.role": "deployment"}],
        )
        assert _becomes(run, "AwaitingRetry", 120)
    finally:
        run_coro_as_sync(remove(impatient))
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(run)
    (crashed,) = [state for state in states if state.name == "Crashed"]
    assert crashed.message == "nothing was heard from its process for 0:00:10"


def test_a_rule_that_was_switched_off_by_hand_stays_off(service: Service) -> None:
    from prefect.client.orchestration import get_client
    from prefect.utilities.asyncutils import run_coro_as_sync

    from flows.automations import rules
    from flows.furnishing import POOL, furnish

    async def read() -> dict[str, Any]:
        async with get_client() as client:
            found = {rule.name: await client.read_automations_by_name(rule.name) for rule in rules(POOL)}
        return {name: one for name, (one,) in found.items()}

    async def switch(identity: UUID, on: bool) -> None:
        async with get_client() as client:
            await (client.resume_automation if on else client.pause_automation)(identity)

    before = run_coro_as_sync(read())
    assert len(before) == 3 and all(one.enabled for one in before.values())
    off = next(iter(before.values()))
    run_coro_as_sync(switch(off.id, False))
    try:
        furnish(service.api, service.auth)
        after = run_coro_as_sync(read())
    finally:
        run_coro_as_sync(switch(off.id, True))
    assert {one.id for one in after.values()} == {one.id for one in before.values()}
    assert [one.name for one in after.values() if not one.enabled] == [off.name]
