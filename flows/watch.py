"""The watcher: `python -m flows.watch`, which `xtuner up` starts beside server and worker, looks at the server every few seconds.

It alerts when a run failed or crashed, when a run or schedule is late, when no worker is alive, and when the server itself is away: once
per cause, and once more when it is over. Each time: a line in HOME/alerts.log and on its output, the artifact `finetune-alerts`, and JSON
to a webhook, if there is one: its address is the only line of HOME/webhook (mode 0600) or in XTUNER_ALERT_WEBHOOK.

A loop, and not Prefect's automations: those live in the server, so they cannot tell that it is away or that its own loops hang; they
write no log or artifact; and they keep a webhook's address in the database, which backups copy.

HOME/watch.json holds what is open: after a restart of the watcher nothing is told twice, and what failed meanwhile is told. A disk that
takes nothing any more does not end the watch: the webhook still tells.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx
from cyclopts import App, Parameter
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.utilities.urls import url_for

from flows.trouble import barren_schedules, deserted_pools, failed_runs, late_runs, mended
from pipelines.model_card import plain
from pipelines.processes import tail
from xtuner_core.durable import write_json

KEY = "finetune-alerts"
WEBHOOK = "XTUNER_ALERT_WEBHOOK"
PATIENCE = {"server": 15, "pool": 60, "schedule": 300}
"""Kind of cause → seconds that it must last before it is told; a restart is no alarm. The other kinds have lasted when they are seen."""
OVERLAP = timedelta(minutes=2)
"""Of two looks for failed runs: a run's end may reach the database a little late."""
SHOWN, REMEMBERED, UNSENT = 100, 500, 100


@dataclass(frozen=True, slots=True)
class Watch:
    """What the watcher knows between two looks; what HOME/watch.json holds."""

    since: str
    """Time of the last look that the server answered; on disk, of the last change."""
    open: dict[str, str] = field(default_factory=dict)
    """Cause → what is wrong."""
    brewing: dict[str, str] = field(default_factory=dict)
    """Cause that has not lasted long enough to be told → when it was first seen."""
    told: list[str] = field(default_factory=list)
    """Failed runs that need not be told again."""
    unsent: list[dict[str, str]] = field(default_factory=list)
    """What the webhook did not take yet."""
    shown: bool = True
    """Whether the artifact tells the newest."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something begins to be wrong, or ceases to."""

    state: str
    cause: str
    text: str


def look(client: SyncPrefectClient, watch: Watch, late: float) -> dict[str, str]:
    """All that is wrong now: cause → text. Failed runs stay wrong until one is completed."""
    failed = failed_runs(client, datetime.fromisoformat(watch.since) - OVERLAP)
    known = {cause: text for cause, text in watch.open.items() if cause.startswith("run ")}
    runs = {cause: text for cause, text in failed.items() if cause not in watch.told} | known
    for cause in list(mended(client, runs)):
        del runs[cause]
    return runs | late_runs(client, late) | barren_schedules(client) | deserted_pools(client)


def compare(watch: Watch, found: Mapping[str, str], now: datetime, patience: Mapping[str, float]) -> tuple[Watch, list[Change]]:
    """What changed with this look. A cause that must last is only noted at first."""
    brewing = {cause: watch.brewing.get(cause, now.isoformat()) for cause in found if cause not in watch.open}
    ripe = [cause for cause, first in brewing.items() if now - datetime.fromisoformat(first) >= _lasting(cause, patience)]
    begun = [Change("ALERT", cause, found[cause]) for cause in ripe]
    over = [Change("OVER", cause, text) for cause, text in watch.open.items() if cause not in found]
    opened = {cause: text for cause, text in watch.open.items() if cause in found} | {one.cause: one.text for one in begun}
    told = [*watch.told, *(cause for cause in ripe if cause.startswith("run "))][-REMEMBERED:]
    brewing = {cause: first for cause, first in brewing.items() if cause not in ripe}
    return replace(watch, open=opened, brewing=brewing, told=told), [*over, *begun]


def _lasting(cause: str, patience: Mapping[str, float]) -> timedelta:
    return timedelta(seconds=patience.get(cause.split()[0], 0))


def step(client: SyncPrefectClient, home: Path, watch: Watch, late: float, patience: Mapping[str, float]) -> Watch:
    """Look once, tell what changed, write down what is known."""
    now = datetime.now(UTC)
    try:
        after, changes = compare(watch, look(client, watch, late), now, patience)
        after = tell(home, replace(after, since=now.isoformat()), changes, now)
        if not after.shown:
            client.create_artifact(ArtifactCreate(key=KEY, type="markdown", description=summary(after), data=page(home, after)))
            after = replace(after, shown=True)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        away = {"server": f"Prefect's server does not answer ({type(error).__name__})"}
        after, changes = compare(watch, watch.open | away, now, patience)
        after = tell(home, after, changes, now)
    left = deliver(home, after.unsent)
    if left and not watch.unsent:
        _say("the webhook did not take an alert; it is tried again with every look")
    after = replace(after, unsent=left)
    if replace(after, since=watch.since) != watch or not (home / "watch.json").exists():
        with suppress(OSError):
            write_json(home / "watch.json", asdict(after))
    return after


def _say(line: str) -> None:
    with suppress(OSError):
        print(line, flush=True)


def tell(home: Path, watch: Watch, changes: Sequence[Change], now: datetime) -> Watch:
    """The log at once; artifact and webhook as soon as they can be reached."""
    if not changes:
        return watch
    at = now.isoformat(timespec="seconds")
    lines = [f"{at} {change.state:<5} {' '.join(change.text.split())}" for change in changes]
    with suppress(OSError), open(home / "alerts.log", "a", encoding="utf-8") as log:
        log.writelines(f"{line}\n" for line in lines)
    for line in lines:
        _say(line)
    bodies = [
        {"text": f"{one.state}: {one.text}", "state": one.state.lower(), "cause": one.cause, "at": at, "link": link(one.cause)}
        for one in changes
    ]
    return replace(watch, shown=False, unsent=[*watch.unsent, *bodies][-UNSENT:])


def summary(watch: Watch) -> str:
    """How many alerts are open, in a line."""
    return f"{len(watch.open)} open" if watch.open else "all is well"


def page(home: Path, watch: Watch) -> str:
    """The artifact: what is open, then the log, both newest first."""
    told = (line.split(maxsplit=2) for line in reversed(tail(home / "alerts.log", SHOWN).splitlines()))
    opened = "\n".join(_open(cause, text) for cause, text in reversed(watch.open.items())) or "Nothing: all is well."
    whole = (words for words in told if len(words) == 3)  # one whose writing was cut short, by a full disk say, is not
    log = "\n".join(f"| {at[:10]} {at[11:19]} | {state} | {plain(text)} |" for at, state, text in whole)
    return f"# Alerts\n\n## Open\n\n{opened}\n\n## Log, newest first\n\n| time (UTC) | | what |\n|---|---|---|\n{log}\n"


def _open(cause: str, text: str) -> str:
    return f"- **{plain(text)}**" + (f" [look at the run]({address})" if (address := link(cause)) else "")


def link(cause: str) -> str:
    """Where Prefect's pages show the run; empty if the cause is none."""
    kind, name = cause.split(maxsplit=1) if " " in cause else (cause, "")
    return (url_for("flow-run", obj_id=name) or "") if kind in ("run", "late") else ""


def deliver(home: Path, bodies: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """POST them to the webhook in order; those that it did not take. Without a webhook there is nothing to do."""
    address = webhook(home) if bodies else None
    if address is None:
        return []
    for number, body in enumerate(bodies):
        try:
            httpx.post(address, json=body, timeout=10).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL):  # the message would name the address
            return list(bodies[number:])
    return []


def webhook(home: Path) -> str | None:
    """The address, never a parameter: whoever has it can write to the channel behind it."""
    file = home / "webhook"
    if not file.exists():
        return os.environ.get(WEBHOOK)
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        _say(f"{file} can be read by others and is not used. Run: chmod 600 {file}")
        return None
    return file.read_text(encoding="utf-8").strip()


def read(home: Path) -> Watch:
    """What the last watcher knew; a first one begins now."""
    try:
        return Watch(**json.loads((home / "watch.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Watch(since=datetime.now(UTC).isoformat())


def watch_forever(
    home: Annotated[Path, Parameter(env_var="XTUNER_SERVICE")],
    *,
    every: float = 5.0,
    late: float = 300.0,
    patience: float | None = None,
) -> None:
    """Look every `every` seconds, until a signal ends it.

    Args:
        home: The service's folder.
        every: Seconds between two looks.
        late: Seconds after which a run that has not begun is late.
        patience: Seconds that server, worker or schedule must be away, instead of the usual 15, 60 and 300.
    """
    logging.getLogger("httpx").setLevel(logging.ERROR)  # it names addresses
    watch, lasting = read(home), PATIENCE if patience is None else dict.fromkeys(PATIENCE, patience)
    print(f"watching {os.environ.get('PREFECT_API_URL', 'the server of the profile')}", flush=True)
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        while True:
            watch = step(client, home, watch, late, lasting)
            time.sleep(every)


if __name__ == "__main__":
    App(name="python -m flows.watch", default_command=watch_forever)()
