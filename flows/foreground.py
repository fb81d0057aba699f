"""One part of the service in the foreground, for what starts it again when it ends or the machine does: systemd, a container engine.

    python -m flows.foreground server|worker|watch|deploy

Settings come by environment (deploy/service.env.example) or as options.

`deploy` ends when prefect.yaml is deployed; the others when they are stopped by SIGTERM or Ctrl-C (0) or by themselves (1). The worker's
flow runs are stopped before it, and save their checkpoints, which takes up to RUN_GRACE_SECONDS.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from flows.service import (
    AUTH,
    DATABASE,
    DEFAULT_HOME,
    PORT,
    STARTUP_SECONDS,
    Service,
    environment_of,
    is_healthy,
    kept_secret,
    known_anywhere,
    locked,
    read,
    settle,
    start,
    stop,
)
from xtuner_core.errors import StorageError, UserError

POLL_SECONDS = 0.5
LOCK_SECONDS = 60
"""All parts start together after a boot, and each notes its process."""


def run(
    part: Literal["server", "worker", "watch", "deploy"],
    *,
    recipe: Annotated[str, Parameter(env_var="XTUNER_RECIPE")],
    store: Annotated[Path, Parameter(env_var="XTUNER_STORE")] = Path("artifacts"),
    home: Annotated[Path, Parameter(env_var="XTUNER_HOME")] = DEFAULT_HOME,
    port: Annotated[int, Parameter(env_var="XTUNER_PORT")] = PORT,
) -> int:
    """Start the part and stay until it ends or is stopped; the exit code.

    Raises:
        UserError: as `up`; the part runs already; the server does not answer.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT: someone tries it in a terminal
        signal.signal(number, lambda number, frame: asked.append(number))
    home, known = home.resolve(), known_anywhere(recipe)
    with locked(home, LOCK_SECONDS):
        service = replace(_settled(part, home, port), store=store.resolve(), recipe=known)
        if part in service.pids:
            raise StorageError(f"the {part} runs already; stop it where it was started, or all with `xtuner down`.")
        service = start(service, part) if part == "server" else service
    if part != "server" and not _server_answers(service, asked):
        return 0 if asked else 1
    if part == "deploy":
        return _deploy(service)
    if part != "server":
        with locked(home, LOCK_SECONDS):
            service = start(replace(service, started=_started(home)), part)
    while not asked and part in service.pids:
        time.sleep(POLL_SECONDS)
    stop(replace(service, started=_started(home)), [part])
    return 0 if asked else 1


def _settled(part: str, home: Path, port: int) -> Service:
    """Only the server looks for its port; in a container the others do not even see its process."""
    auth = os.environ.get(AUTH) or None
    if part == "server":
        return settle(home, port, auth, os.environ.get(DATABASE) or None)
    return Service(home, port, Path(), "", _started(home), auth or kept_secret(home, "auth"), kept_secret(home, "database"))


def _started(home: Path) -> Mapping[str, tuple[int, str]]:
    noted = read(home)
    return noted.started if noted else {}


def _server_answers(service: Service, asked: list[int]) -> bool:
    deadline = time.monotonic() + STARTUP_SECONDS
    while not asked and time.monotonic() < deadline:
        if is_healthy(service):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _deploy(service: Service) -> int:
    from flows.furnishing import deploy, furnish

    furnish(service.api, service.auth)
    deploy(environment_of(service), service.home / "deploy.log")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(App(name="python -m flows.foreground", default_command=run)(result_action="return_value"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
