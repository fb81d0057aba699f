"""What a server must hold before runs can come: the work pool, the slot for computing, the rules for crashed runs, the deployments."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker

from flows import automations
from flows.accelerator import LIMIT
from pipelines.processes import tail
from pipelines.recipe import PROJECT
from xtuner_core.errors import StorageError

POOL = "local"


def furnish(api: str, auth: str | None) -> None:
    """Create what is missing; what someone changed by hand in pool and limit stays."""
    asyncio.run(_furnish(api, auth))


async def _furnish(api: str, auth: str | None) -> None:
    template = ProcessWorker.get_default_base_job_template()
    async with PrefectClient(api, auth_string=auth, httpx_settings={"trust_env": False}) as client:  # on loopback: past any proxy
        with suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template))
        if LIMIT not in {limit.name for limit in await client.read_global_concurrency_limits()}:
            await client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        await automations.install(client, POOL)


def deploy(environment: Mapping[str, str], log: Path) -> None:
    """Deploy everything of prefect.yaml to the server of `environment`; schedules that were paused by hand stay paused.

    Raises:
        StorageError: Prefect refused; the message ends with what it said.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with open(log, "wb") as sink:
        done = subprocess.run(command, cwd=PROJECT, env=dict(environment), stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise StorageError(f"prefect.yaml could not be deployed. The end of {log}:\n{tail(log)}")
