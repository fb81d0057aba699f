"""What the watcher makes of what it sees: once per cause, and only of what lasts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from flows.watch import PATIENCE, Change, Watch, compare

NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)
FAILED = {"run 1": "weekly failed: no luck"}
AWAY = {"pool local": "no worker"}


def look(watch: Watch, found: dict[str, str], seconds: float) -> tuple[Watch, list[Change]]:
    return compare(watch, found, NOON + timedelta(seconds=seconds), PATIENCE)


def test_a_cause_is_told_once_and_once_more_when_it_is_over() -> None:
    watch, changes = look(Watch(since=""), FAILED, 0)
    assert changes == [Change("ALERT", "run 1", FAILED["run 1"])]
    watch, changes = look(watch, FAILED, 5)
    assert changes == []
    watch, changes = look(watch, {}, 10)
    assert changes == [Change("OVER", "run 1", FAILED["run 1"])]
    assert (watch.open, watch.told) == ({}, ["run 1"])


def test_a_restart_of_a_worker_is_no_alert_and_its_end_is() -> None:
    watch, changes = look(Watch(since=""), AWAY, 0)
    assert changes == [] and list(watch.brewing) == ["pool local"]
    watch, changes = look(watch, {}, 30)
    assert changes == [] and watch.brewing == {}
    for seconds, expected in ((40, []), (95, []), (101, [Change("ALERT", "pool local", "no worker")]), (106, [])):
        watch, changes = look(watch, AWAY, seconds)
        assert changes == expected, seconds
    assert watch.brewing == {}
