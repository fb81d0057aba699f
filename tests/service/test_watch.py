"""The watcher beside the real server: what it tells, once per cause, and that it is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.service import Service
from flows.watch import KEY, PATIENCE, Watch, read, step
from pipelines.recipe import PROJECT
from tests.service.conftest import free_port

SECRET = "canary-4711"


@dataclass(slots=True)
class Channel:
    """What stands behind a webhook: it refuses the first message, and keeps the others."""

    home: Path
    received: list[dict[str, str]] = field(default_factory=list)
    refused: int = 0

    @property
    def log(self) -> str:
        file = self.home / "alerts.log"
        return file.read_text() if file.exists() else ""

    def told(self, state: str, text: str) -> bool:
        """In the log and at the webhook, once."""
        lines = [line for line in self.log.splitlines() if line.split()[1] == state and text in line]
        bodies = [body for body in self.received if body["state"] == state.lower() and text in body["text"]]
        assert len(lines) <= 1 and len(bodies) <= 1
        return len(lines) == len(bodies) == 1


def wait_for(happened: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def channel(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Channel]:
    """A watcher of its own in a hurry, with a webhook."""
    home = tmp_path_factory.mktemp("watch")
    channel = Channel(home)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            accepted = channel.refused > 0
            channel.received.extend([body] if accepted else [])
            channel.refused += not accepted
            self.send_response(200 if accepted else 503)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (home / "webhook").touch(mode=0o600)
    (home / "webhook").write_text(f"http://127.0.0.1:{server.server_port}/{SECRET}\n")
    command = [sys.executable, "-m", "flows.watch", str(home), "--every", "0.5", "--late", "3", "--patience", "1"]
    env = {**os.environ, **service.environment, "PREFECT_HOME": str(home / "prefect")}
    with open(home / "output", "wb") as output:
        watcher = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for((home / "watch.json").exists)
        yield channel
    finally:
        watcher.terminate()
        watcher.wait()
        server.shutdown()


@pytest.fixture(scope="module")
def pool(service: Service) -> str:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    with SyncPrefectClient(service.api) as client:
        template = ProcessWorker.get_default_base_job_template()
        return client.create_work_pool(WorkPoolCreate(name="second", type="process", base_job_template=template)).name


def test_a_failed_run_is_told_once_and_that_a_later_one_is_well(channel: Channel) -> None:
    from prefect import flow
    from prefect.artifacts import Artifact

    @flow(name="sometimes", flow_run_name="sometimes well")
    def sometimes(well: bool) -> None:
        if not well:
            raise ValueError("no *luck*\nthis time")

    with pytest.raises(ValueError, match="luck"):
        sometimes(False)
    wait_for(lambda: channel.told("ALERT", "sometimes well failed: Flow run encountered an exception: ValueError: no *luck*; this time"))
    shown = Artifact.get(key=KEY)
    assert shown and "- **sometimes well failed:" in str(shown.data) and "no \\*luck\\*" in str(shown.data)
    assert "/runs/flow-run/" in channel.received[-1]["link"] and channel.received[-1]["link"] in str(shown.data)
    sometimes(True)
    wait_for(lambda: channel.told("OVER", "sometimes well failed"))
    assert channel.refused == 1, "the webhook was not asked again"


def test_a_worker_that_stands_still_is_told(channel: Channel, service: Service, pool: str) -> None:
    wait_for(lambda: channel.told("ALERT", "work pool second"))
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    env = {**os.environ, **service.environment, "PREFECT_WORKER_HEARTBEAT_SECONDS": "1", "PREFECT_HOME": str(channel.home / "prefect")}
    with open(channel.home / "worker.log", "wb") as log:
        worker = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_for(lambda: channel.told("OVER", "work pool second"))
        worker.send_signal(signal.SIGSTOP)
        wait_for(lambda: channel.log.count("ALERT no worker of work pool second") == 2)
        worker.send_signal(signal.SIGCONT)
        wait_for(lambda: channel.log.count("OVER  no worker of work pool second") == 2)
    finally:
        worker.kill()
        worker.wait()


def test_a_schedule_that_nobody_serves_is_told(channel: Channel, service: Service) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
    from prefect.client.schemas.schedules import IntervalSchedule

    often = IntervalSchedule(interval=timedelta(seconds=10), anchor_date=datetime.now(UTC))  # pyright: ignore[reportArgumentType]
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="nobody", type="process"))
        flow = client.create_flow_from_name("forgotten")
        made = client.create_deployment(
            flow, "forgotten", work_pool_name="nobody", schedules=[DeploymentScheduleCreate(schedule=often, active=True)]
        )
        wait_for(lambda: "should have begun at" in channel.log)
        client.delete_deployment(made)
    wait_for(lambda: any(line.split()[1] == "OVER" and "should have begun" in line for line in channel.log.splitlines()))


def test_a_server_that_is_away_is_told_when_it_lasts_and_shown_when_it_is_back(service: Service, tmp_path: Path) -> None:
    from prefect.artifacts import Artifact
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    nobody = SyncPrefectClient(f"http://127.0.0.1:{free_port()}/api")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), nobody as client:
        first = step(client, tmp_path, read(tmp_path), 300, PATIENCE)
        assert not first.open and not (tmp_path / "alerts.log").exists()
        away = step(client, tmp_path, first, 300, {"server": 0})
        assert list(away.open) == ["server"] and step(client, tmp_path, away, 300, {"server": 0}) == away
    with SyncPrefectClient(service.api) as client:
        back = step(client, tmp_path, read(tmp_path), 300, PATIENCE)
    assert back.shown and "server" not in back.open
    assert [line.split()[1] for line in (tmp_path / "alerts.log").read_text().splitlines() if "does not answer" in line] == [
        "ALERT",
        "OVER",
    ]
    shown = Artifact.get(key=KEY)
    assert shown and "Prefect's server does not answer" in str(shown.data)


def test_the_webhook_s_address_is_told_nowhere(channel: Channel, pool: str) -> None:
    wait_for(lambda: channel.received, 120)  # that the second pool has no worker, at least
    for file in channel.home.rglob("*"):
        assert file.name == "webhook" or not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_webhook_file_that_others_can_read_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.watch import deliver

    (tmp_path / "webhook").write_text("http://127.0.0.1:1/")
    (tmp_path / "webhook").chmod(0o644)
    assert deliver(tmp_path, [{"text": "x"}]) == []
    assert f"chmod 600 {tmp_path / 'webhook'}" in capsys.readouterr().out
    (tmp_path / "webhook").chmod(0o600)
    assert deliver(tmp_path, [{"text": "x"}]) == [{"text": "x"}]


def test_a_first_watcher_begins_now(tmp_path: Path) -> None:
    (tmp_path / "watch.json").write_text("{ torn")
    begun = read(tmp_path)
    assert begun == Watch(since=begun.since) and datetime.now(UTC) - datetime.fromisoformat(begun.since) < timedelta(minutes=1)
