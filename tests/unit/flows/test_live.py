"""What a stage says while it runs: by level, and as progress that never stands in its way."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import live


def test_lines_have_their_level(caplog: pytest.LogCaptureFixture) -> None:
    log = live.by_level(logging.getLogger("stage"))
    with caplog.at_level(logging.INFO, "stage"):
        for line in ("Step 1/6", "warning: slow disk", "error: no disk", "no error: all is well"):
            log(line)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "Step 1/6"),
        ("WARNING", "slow disk"),
        ("ERROR", "no disk"),
        ("INFO", "no error: all is well"),
    ]


def test_progress_is_sent_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[float, str]] = []
    monkeypatch.setattr(live, "create_progress_artifact", lambda progress, description: sent.append((progress, description)) or "id")
    monkeypatch.setattr(live, "update_progress_artifact", lambda artifact_id, progress, description: sent.append((progress, artifact_id)))
    times = iter([0.0, 0.0, 1.0, 4.9, 5.1, 5.1, 6.0])
    progress = live.live_progress("train", logging.getLogger("stage"), lambda: next(times))
    for done in (0.1, 0.2, 0.3, 0.4, 1.0):
        progress(done, "step")
    assert sent == [(10.0, "train: step"), (40.0, "id"), (100.0, "id")]


def test_a_server_that_is_away_neither_fails_nor_delays_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: address, PREFECT_HOME: tmp_path}), caplog.at_level(logging.DEBUG, "stage"):
            started = time.process_time()
            live.live_progress("train", logging.getLogger("stage"))(0.5, "step 3 of 6")
    assert "progress is not shown" in caplog.text
    assert time.process_time() - started < 5
