"""`prefect deployment run ...` as it is typed, against the real server and worker; what the server refuses; the slot for computing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from flows.service import Service
from pipelines.recipe import PROJECT, load_recipe
from tests.service.conftest import TINY

pytestmark = pytest.mark.slow


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's entry points as pip would install them from pyproject.toml, also where it is only on the path."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    sections = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(sections))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(PROJECT)]))


def prefect(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, as typed in the project's folder."""
    command = [str(Path(sys.executable).with_name("prefect")), *words]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=400)


def test_the_bare_name_runs_the_whole_flow_and_watch_tells_how_it_ended(service: Service, installed: None) -> None:
    done = prefect("deployment", "run", "finetune-flow", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "for deployment 'finetune-flow/finetune-flow'" in done.stdout
    assert "'Completed'" in done.stdout
    assert "plugin" not in done.stderr
    unknown = prefect("deployment", "run", "nothing-of-the-kind")
    assert (unknown.returncode, unknown.stdout.strip()) == (1, "Deployment 'nothing-of-the-kind' not found!")
    extra = prefect("deployment", "run", "finetune-flow", "-p", "nope=1")
    assert extra.returncode == 1
    assert "not found on the deployment: 'nope'" in extra.stdout + extra.stderr


def test_the_project_s_deployments_are_found_where_the_package_is_not_installed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_PLUGINS_ENABLED", "false")
    done = prefect("deployment", "inspect", "finetune-flow/weekly", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert prefect("deployment", "inspect", "weekly").returncode == 1


@pytest.fixture
def without_limit(service: Service) -> Iterator[None]:
    from prefect.client.orchestration import get_client
    from prefect.utilities.asyncutils import run_coro_as_sync

    async def delete() -> None:
        async with get_client() as client:
            await client.delete_global_concurrency_limit_by_name("accelerator")

    run_coro_as_sync(delete())
    yield
    from flows.furnishing import furnish

    furnish(service.api, service.auth)


def test_a_run_without_the_limit_fails_loudly_and_watch_says_so(service: Service, installed: None, without_limit: None) -> None:
    done = prefect("deployment", "run", "finetune-flow", "-p", 'changes=["chat.max_tokens=3"]', "--watch")
    assert done.returncode == 1
    assert "finished in state 'Failed'" in done.stdout
    latest = max(_runs_by_hand(), key=lambda run: run.created)
    assert "the limit accelerator: " in latest.state.message
    assert "`xtuner up` creates it." in latest.state.message


def test_one_run_computes_at_a_time(service: Service) -> None:
    from prefect import flow
    from prefect.concurrency.sync import concurrency

    from flows.accelerator import accelerator
    from pipelines import chat, prepare

    taken, released = threading.Event(), threading.Event()

    @flow
    def another() -> None:
        with concurrency("accelerator", strict=True):
            taken.set()
            time.sleep(5)
            released.set()

    @flow
    def ours() -> int:
        assert taken.wait(60)
        with accelerator(prepare.STAGE):
            assert not released.is_set(), "what computes nothing must not wait"
        with accelerator(chat.STAGE):
            assert released.is_set()
            return _active()

    thread = threading.Thread(target=copy_context().run, args=(another,))  # a new thread would have Prefect's settings of the start
    thread.start()
    ours_held = ours()
    thread.join()
    assert (ours_held, _active()) == (1, 0)


def _active() -> int:
    from prefect.client.orchestration import get_client
    from prefect.utilities.asyncutils import run_coro_as_sync

    async def read() -> int:
        async with get_client() as client:
            return (await client.read_global_concurrency_limit_by_name("accelerator")).active_slots

    found = run_coro_as_sync(read())
    assert found is not None
    return found


def _runs_by_hand() -> list[Any]:
    """Of the deployment without a schedule: the server's scheduler adds to those of the others whenever it likes."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    with get_client(sync_client=True) as client:
        by_hand = FlowRunFilterDeploymentId(any_=[client.read_deployment_by_name("finetune-flow/finetune-flow").id])
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=by_hand), limit=200)


WHOLE = load_recipe(str(TINY)).model_dump(mode="json")

REFUSED = [
    ({"trigger": "never"}, "trigger"),
    ({"changes": "train.lr=1"}, "changes"),
    ({"recipe": {**WHOLE, "bogus": 1}}, "recipe"),
    ({"recipe": {**WHOLE, "train": {**WHOLE["train"], "lr": -1.0}}}, "recipe"),
    ({"recipe": {**WHOLE, "chat": {**WHOLE["chat"], "min_correct": 2}}}, "recipe"),
]


@pytest.mark.parametrize(("parameters", "named"), REFUSED, ids=str)
def test_the_server_refuses(service: Service, parameters: dict[str, Any], named: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    before = {run.id for run in _runs_by_hand()}
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("finetune-flow/finetune-flow")
        with pytest.raises(PrefectHTTPStatusError) as refusal:
            client.create_flow_run_from_deployment(deployment.id, parameters={**deployment.parameters, **parameters})
    assert refusal.value.response.status_code in (409, 422)
    assert named in refusal.value.response.text
    assert {run.id for run in _runs_by_hand()} == before


def test_what_is_deployed(service: Service) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        weekly = client.read_deployment_by_name("finetune-flow/weekly")
        by_hand = client.read_deployment_by_name("finetune-flow/finetune-flow")
    assert weekly.parameters == {"recipe": str(TINY), "store": str(service.store), "trigger": "schedule"}
    assert by_hand.parameters == {"recipe": str(TINY), "store": str(service.store)}
    assert weekly.global_concurrency_limit is not None and weekly.global_concurrency_limit.limit == 1
    assert weekly.concurrency_options is not None and weekly.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    assert [(one.schedule.cron, one.active) for one in weekly.schedules] == [("0 3 * * 1", True)]
    assert by_hand.schedules == []
    assert {weekly.work_pool_name, by_hand.work_pool_name} == {"local"}
