"""One real Prefect server with its worker, on loopback, for all tests of this folder; they run on one worker of pytest-xdist."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.service import Service, down, up

TINY = Path(__file__).parent / "tiny.yaml"
SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_API_KEY")
CANARIES = {name: f"canary-of-{name}" for name in SECRETS} | {"XTUNER_ALERT_WEBHOOK": "http://127.0.0.1:9/canary-of-webhook"}
"""In the environment of everything that the service starts; test_canaries.py looks where they come out."""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group("service"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Server, worker and all deployments, with a store and a home of their own; the deployments' recipe is tiny.yaml."""
    place = tmp_path_factory.mktemp("service")
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in CANARIES.items():
                environment.setenv(name, value)
            running = up(place / "home", place / "store", str(TINY), free_port())
        yield running
    finally:
        down(place / "home")


@pytest.fixture(autouse=True)
def _client_of_the_service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Prefect's clients in a test that uses `service`, and in processes that it starts, talk to that server."""
    if "service" not in request.fixturenames:
        yield
        return
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    running: Service = request.getfixturevalue("service")
    for name, value in {**running.environment, "PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "1"}.items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: running.api, PREFECT_HOME: tmp_path / "prefect"}):
        yield
