"""What the watcher makes of what it sees: once per cause, and only of what lasts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.watch import PATIENCE, Change, Watch, compare, page, step

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


def test_a_line_of_the_log_that_was_cut_short_does_not_end_the_watch(tmp_path: Path) -> None:
    (tmp_path / "alerts.log").write_text("2026-01-05T12:00:00+00:00 ALERT weekly failed\n\n2026-01-05T12:0")
    shown = page(tmp_path, Watch(since=""))
    assert shown.count("\n| 2026-01-05") == 1 and "| 2026-01-05 12:00:00 | ALERT | weekly failed |" in shown


def test_a_home_in_which_nothing_can_be_written_does_not_end_the_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    for name in ("alerts.log", "watch.json"):
        (tmp_path / name).mkdir()
    with SyncPrefectClient("http://127.0.0.1:9/api") as client:
        seen = step(client, tmp_path, Watch(since=NOON.isoformat()), 300, {"server": 0})
    assert list(seen.open) == ["server"]
    assert "ALERT Prefect's server does not answer" in capsys.readouterr().out
    assert "Nothing: all is well" in page(tmp_path, Watch(since=""))
