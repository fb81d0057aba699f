"""What the server does when a process dies without a word: `make up` installs these rules.

A flow run that gives no more sign of life becomes Crashed, and a crashed one runs again: finished stages are found in the store, training
goes on from its checkpoint. A run gets ATTEMPTS attempts; one that dies before its flow begins (`run-count` 0) gets one more.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import EventTrigger
from prefect.events.actions import ActionTypes, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, Posture

HEARTBEAT_SECONDS = 30
"""Between a flow run's signs of life; the least that Prefect allows."""
ATTEMPTS = 3
FLOW = "finetune-flow"


def rules(pool: str) -> tuple[AutomationCore, ...]:
    """The rules, for runs of work pool `pool`: in it someone is there to run them again."""
    return (
        crashed_if_silent("heartbeat", timedelta(seconds=3 * HEARTBEAT_SECONDS)),
        crashed_if_silent("Pending", timedelta(minutes=10)),
        _again(pool),
    )


def crashed_if_silent(last: str, seconds: timedelta) -> AutomationCore:
    """Whatever a run does is an event; a deployment's, whose heartbeats prefect.toml sets, sends at least those."""
    return AutomationCore(
        name=f"finetune: no sign of life after {last}",
        description=f"A flow run from which nothing was heard for {seconds} has lost its process.",
        trigger=EventTrigger(
            after={f"prefect.flow-run.{last}"},
            expect={"prefect.flow-run.*"},
            match_related={"prefect.resource.role": "deployment"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=seconds,
        ),
        actions=[_to(StateType.CRASHED, None, f"nothing was heard from its process for {seconds}")],
    )


def _again(pool: str) -> AutomationCore:
    """Each attempt is repeated once; within the hour also if the server takes its event twice, as it does when its database was locked."""
    return AutomationCore(
        name="finetune: again after a crash",
        description=f"A crashed run goes on where it stood, up to {ATTEMPTS} attempts.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": [str(count) for count in range(ATTEMPTS)]},
            match_related=[_related("flow", FLOW), _related("work-pool", pool)],
            for_each={"prefect.resource.id", "prefect.run-count"},
            posture=Posture.Reactive,
            within=timedelta(hours=1),
        ),
        actions=[_to(StateType.SCHEDULED, "AwaitingRetry", "again after a crash", force=True)],
    )


def _to(state: StateType, name: str | None, message: str, force: bool = False) -> ActionTypes:
    return ChangeFlowRunState(state=state, name=name, message=message, force=force)


def _related(role: str, name: str) -> dict[str, str | list[str]]:
    return {"prefect.resource.role": role, "prefect.resource.name": name}


async def install(client: PrefectClient, pool: str) -> None:
    """Create the rules that are missing and replace those that read otherwise; one that was switched off by hand stays off."""
    for rule in rules(pool):
        found = await client.read_automations_by_name(rule.name)
        if not found:
            await client.create_automation(rule)
        elif not _same(rule, found[0]):
            rule.enabled = found[0].enabled
            await client.update_automation(found[0].id, rule)


def _same(one: AutomationCore, other: AutomationCore) -> bool:
    """Updating makes the server forget what it waits for."""
    read = {"description", "trigger", "actions"}
    return one.model_dump(mode="json", include=read) == other.model_dump(mode="json", include=read)
