"""`xtuner up`, `down`, `status`: Prefect's server and worker on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from pipelines.commands.recipe_options import DEFAULT_STORE, RecipeName, StoreDir

SERVICE = Group("The service: Prefect's server, a worker, schedules")
Home = Annotated[
    Path | None, Parameter(help="Folder of the service, with Prefect's database and the logs; .service in the project if not given.")
]


def up(
    *,
    recipe: RecipeName = "smollm2_135m_instruct_lora_tickets_e3",
    store: StoreDir = DEFAULT_STORE,
    port: int | None = None,
    auth: str | None = None,
    database_url: str | None = None,
    home: Home = None,
) -> None:
    """Start what of the service does not run, and deploy the flows; prints the address of its pages.

    Parameters
    ----------
    recipe
        What the deployments fine-tune unless told otherwise.
    port
        On loopback; 4200, or the next free one, if not given.
    auth
        user:password that the server shall demand; or set the environment variable XTUNER_AUTH.
    database_url
        postgresql+asyncpg://USER:PASSWORD@HOST/NAME, for runs that overlap; kept in the service's folder, which otherwise holds an SQLite
        database. Or set the environment variable XTUNER_DATABASE_URL: others on this machine can read arguments.
    """
    if auth:
        os.environ["XTUNER_AUTH"] = auth  # not an argument: others on this machine can read those
    if database_url:
        os.environ["XTUNER_DATABASE_URL"] = database_url
    _become("up", home, "--recipe", recipe, "--store", str(store), *([f"--port={port}"] if port else []))


def down(*, home: Home = None) -> None:
    """Stop the service and its flow runs, which save their checkpoints first; nothing else."""
    _become("down", home)


def status(*, home: Home = None) -> None:
    """Say what of the service runs, and where; exit code 1 if not all of it does."""
    _become("status", home)


def _become(command: str, home: Path | None, *arguments: str) -> None:
    place = [f"--home={home}"] if home else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "flows.service", command, *arguments, *place])
