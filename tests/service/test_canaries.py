"""Secrets stay where they are, and nobody is told what we do: the service runs with canaries in its environment (conftest.py)."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import psutil
import pytest

from flows.service import Service
from tests.service.conftest import CANARIES

CANARY = "canary-of-"
KEPT = ("artifacts", "logs", "flow_runs", "task_runs", "deployments", "work_pools", "block_documents", "variables", "events")
"""What the server tells of when it is asked."""


def ask(service: Service, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{service.api}/{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def used(service: Service) -> Service:
    """Something was run on it."""
    from prefect.deployments import run_deployment
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: service.api}):
        run: Any = run_deployment("finetune-flow/finetune-flow", timeout=400, poll_interval=0.5)
    assert run.state and run.state.is_completed(), run.state
    return service


def test_no_secret_of_the_environment_is_written_down(used: Service) -> None:
    for part in ("worker", "watch"):
        environment = psutil.Process(used.pids[part]).environ()
        assert CANARIES.items() <= environment.items(), part
    files = [file for root in (used.store, used.home) for file in root.rglob("*") if file.is_file()]
    assert {"manifest.json", "train.log", "prefect.db", "worker.log", "service.json"} <= {file.name for file in files}
    assert [str(file) for file in files if CANARY.encode() in file.read_bytes()] == []


def test_no_secret_of_the_environment_is_told_by_the_server(used: Service) -> None:
    told = {what: ask(used, f"{what}/filter", {}) for what in KEPT}
    assert told["artifacts"] and told["logs"] and told["events"]["events"]
    assert [what for what, answer in told.items() if CANARY in json.dumps(answer)] == []


def test_the_server_tells_nobody_what_it_does(service: Service) -> None:
    settings = ask(service, "admin/settings")
    assert settings["server"]["analytics_enabled"] is False
    for part in service.pids.values():
        assert psutil.Process(part).environ()["DO_NOT_TRACK"] == "1"
