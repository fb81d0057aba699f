"""`xtuner up`, `down` and `status` with real processes: beside the service of the other tests, one of its own with a password."""

from __future__ import annotations

import base64
import os
import signal
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.service import MARK, Service, down, free_port_from, read, up
from tests.service.conftest import TINY, free_port
from xtuner_core.errors import RecipeError

pytestmark = pytest.mark.slow

PASSWORD = "someone:a-secret-of-this-test"


@pytest.fixture(scope="module")
def guarded(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A second service, with a password; its store is the other one's, where the first stages lie already."""
    home = tmp_path_factory.mktemp("guarded") / "home"
    try:
        yield up(home, service.store, str(TINY), free_port(), PASSWORD)
    finally:
        down(home)


def _ask(service: Service, path: str, password: str | None) -> int:
    """The status with which the server answers."""
    header = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"} if password else {}
    request = urllib.request.Request(service.api + path, data=b"{}", headers={"Content-Type": "application/json", **header})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def _processes(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_password_is_demanded_and_stays_in_one_file(guarded: Service) -> None:
    assert [_ask(guarded, "/deployments/filter", password) for password in (None, "someone:else", PASSWORD)] == [401, 401, 200]
    assert _ask(guarded, "/work_pools/filter", PASSWORD) == 200
    kept = guarded.home / "auth"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.read_text() == PASSWORD
    said = [file for file in guarded.home.rglob("*") if file.is_file() and file != kept]
    assert {"service.json", "server.log", "worker.log", "deploy.log", "prefect.db"} <= {file.name for file in said}
    assert not [file for file in said if PASSWORD.encode() in file.read_bytes()]
    assert not [process for process in _processes(guarded.home) if PASSWORD in " ".join(process.cmdline())]
    assert PASSWORD not in repr(guarded)


def test_only_what_is_missing_is_started_again(guarded: Service) -> None:
    """Also without the password, and with the deployments, the port and the database of before."""
    before = _deployments(guarded)
    assert up(guarded.home, guarded.store, str(TINY)).pids == guarded.pids
    for part in ("worker", "server"):
        os.kill(guarded.pids[part], signal.SIGKILL)
    _wait_until(lambda: not {"worker", "server"} & set(guarded.pids))
    again = up(guarded.home, guarded.store, str(TINY))
    assert (again.port, again.auth, set(again.pids)) == (guarded.port, PASSWORD, set(guarded.started))
    assert again.pids["watch"] == guarded.pids["watch"]
    assert _deployments(again) == before and len(before) >= 2
    assert read(guarded.home) == again


def _deployments(service: Service) -> dict[str, str]:
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(service.api, auth_string=service.auth) as client:
        return {deployment.name: str(deployment.id) for deployment in client.read_deployments()}


def _wait_until(holds: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_cannot_be_is_refused_in_words(service: Service, guarded: Service, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"port {service.port} is taken by another program"):
        up(tmp_path / "home", tmp_path, str(TINY), service.port)
    with pytest.raises(RecipeError, match=f"runs already on port {guarded.port}"):
        up(guarded.home, guarded.store, str(TINY), port=guarded.port + 1)
    with pytest.raises(RecipeError, match="with its own AUTH"):
        up(guarded.home, guarded.store, str(TINY), auth="someone:else")
    with pytest.raises(RecipeError, match="no-such-recipe': no such file"):
        up(tmp_path / "home", tmp_path, "no-such-recipe")
    assert down(tmp_path / "home") == []


def test_a_taken_port_is_passed_over(service: Service) -> None:
    assert free_port_from(service.port) > service.port


def test_down_ends_a_training_run_in_order_and_everything_else(service: Service, guarded: Service) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    running = read(guarded.home)
    assert running is not None
    changes = ["train.total_step=100000", "train.checkpoint_interval=100000", "train.lr=1e-4"]
    with SyncPrefectClient(guarded.api, auth_string=PASSWORD) as client:
        deployment = client.read_deployment_by_name("finetune-flow/finetune-flow")
        client.create_flow_run_from_deployment(deployment.id, parameters={**deployment.parameters, "changes": changes})
    _wait_until(lambda: "Step 2/100000" in _training_log(service.store), 400)
    assert "flow runs" in down(guarded.home)
    assert "saved checkpoint" in _training_log(service.store)
    assert _processes(guarded.home) == []
    assert not (guarded.home / "service.json").exists() and not (guarded.home / "auth").exists()
    assert set(service.pids) == set(service.started), "it ended what is not its own"
    assert down(guarded.home) == []


def _training_log(store: Path) -> str:
    """Of the only training that is not finished."""
    return "".join(log.read_text(errors="replace") for log in (store / ".work").glob("train-*/record/train.log"))
