"""The service: Prefect's server, a worker and a watcher on this machine, started together, stopped together.

Each is a process of its own session that outlives the terminal. HOME/service.json says which processes they are, by id and birth;
every one of them, and all they start, carries HOME in the environment variable XTUNER_SERVICE, so that nothing that ends up
without a parent is forgotten. HOME also holds Prefect's home with its database, and the logs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Annotated

import psutil
from cyclopts import App, Parameter
from filelock import FileLock, Timeout

from flows.ending import birth, end, frozen, living, marked
from pipelines.processes import tail
from pipelines.recipe import PROJECT, load_recipe, recipe_file, shipped_names
from xtuner_core.durable import write_json
from xtuner_core.errors import Interrupted, RecipeError, StorageError, UserError

HOST, PORT = "127.0.0.1", 4200
MARK, AUTH, DATABASE = "XTUNER_SERVICE", "XTUNER_AUTH", "XTUNER_DATABASE_URL"
PARTS = {
    "server": ("prefect", "server", "start", "--host", HOST),
    "worker": ("prefect", "worker", "start", "--pool", "local", "--type", "process", "--name", "xtuner"),
    "watch": ("flows.watch",),
}
"""In the order in which they start: name → module and arguments."""
STARTUP_SECONDS, SERVER_STARTS, RELEASE_SECONDS = 180, 3, 15
DATABASES = ("postgresql+asyncpg://", "sqlite+aiosqlite:///")
RUN_GRACE_SECONDS = 60
"""For flow runs: their training saves a checkpoint first."""
GRACE_SECONDS = 15
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Service:
    """What runs, and where; `pids` is empty when nothing does."""

    home: Path
    port: int
    store: Path
    recipe: str
    started: Mapping[str, tuple[int, str]]
    """Part → process id and birth."""
    auth: str | None = field(default=None, repr=False)
    """user:password that the server demands."""
    database: str | None = field(default=None, repr=False)
    """URL of the server's database, with its password; SQLite in `home` if there is none."""

    @property
    def ui(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def api(self) -> str:
        return f"{self.ui}/api"

    @property
    def pids(self) -> dict[str, int]:
        """Of the parts that run now."""
        return {name: pid for name, (pid, born) in self.started.items() if living(pid, born)}

    @property
    def environment(self) -> dict[str, str]:
        """What a client must export."""
        return {"PREFECT_API_URL": self.api, **({"PREFECT_API_AUTH_STRING": self.auth} if self.auth else {})}


def up(home: Path, store: Path, recipe: str, port: int | None = None, auth: str | None = None, database: str | None = None) -> Service:
    """Start what does not run yet, deploy everything of prefect.yaml, and wait until all of it answers.

    Raises:
        RecipeError: unknown recipe, a port that another program has, or another port, password or database than those of the running
            server.
        StorageError: a part did not start; the message ends with the end of its log.
    """
    from flows.furnishing import deploy, furnish  # Prefect takes a second to import, which `down` and `status` need not wait

    recipe = known_anywhere(recipe)
    with locked(home):
        service = settle(home, port, auth, database)
        service = replace(service, store=store.resolve(), recipe=recipe)
        _write(service)
        service = _healthy(service)
        furnish(service.api, service.auth)
        deploy(environment_of(service), home / "deploy.log")
        for part in ("worker", *(["watch"] if find_spec("flows.watch") else [])):
            service = start(service, part)
        return service


def known_anywhere(recipe: str) -> str:
    """The recipe's shipped name or its file's absolute path (RecipeError if it is neither, or wrong)."""
    load_recipe(recipe)
    return recipe if recipe in shipped_names() else str(recipe_file(recipe).resolve())


def read(home: Path) -> Service | None:
    """The service of `home` as the last `up` left it; None if it was never up, or is down."""
    try:
        kept = loads((home / "service.json").read_bytes())
    except FileNotFoundError:
        return None
    started = {name: (pid, born) for name, (pid, born) in kept["started"].items()}
    secrets = kept_secret(home, "auth"), kept_secret(home, "database")
    return Service(home, kept["port"], Path(kept["store"]), kept["recipe"], started, *secrets)


def kept_secret(home: Path, secret: str) -> str | None:
    file = home / secret
    return file.read_text(encoding="utf-8") if file.exists() else None


def settle(home: Path, port: int | None, auth: str | None, database: str | None) -> Service:
    """On which port, with which password and database the server shall run; those of a running one stay.

    Raises:
        RecipeError: as `up`.
    """
    if database and not database.startswith(DATABASES):
        raise RecipeError(f"DATABASE_URL must begin with {' or '.join(DATABASES)}, as in {DATABASES[0]}USER:PASSWORD@HOST/NAME.")
    before, database = read(home), database or kept_secret(home, "database")
    running = before is not None and "server" in before.pids
    wanted = (port or before.port, auth or before.auth, database) if before else ()
    if before and running and wanted != (before.port, before.auth, before.database):
        raise RecipeError(
            f"the server runs already on port {before.port}, with its own AUTH and DATABASE_URL. Stop it first: make down (xtuner down)."
        )
    if before and running:
        return before
    if port is not None and not _is_free(port):
        raise RecipeError(f"port {port} is taken by another program. Choose another one (PORT=), or none: then the next free one is taken.")
    kept = before.port if before and _becomes_free(before.port) else None
    started, before_auth = (before.started, before.auth) if before else ({}, None)
    return Service(home, port or kept or free_port_from(PORT), Path(), "", started, auth or before_auth, database)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: what was just closed is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _becomes_free(port: int) -> bool:
    """Also if the server that had it was killed just now: its last thread, which closes its files, may outlast its first by a moment."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while not _is_free(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port_from(first: int) -> int:
    """The first that nobody has."""
    return next(port for port in range(first, 65536) if _is_free(port))


def start(service: Service, part: str) -> Service:
    """Start a part unless it runs, and note it before anything else can go wrong."""
    if part in service.pids:
        return service
    module, *arguments = PARTS[part]
    port = ["--port", str(service.port)] if part == "server" else []
    secrets = {"PREFECT_SERVER_API_AUTH_STRING": service.auth, "PREFECT_SERVER_DATABASE_CONNECTION_URL": service.database}
    own = {name: secret for name, secret in secrets.items() if secret} if part == "server" else {}
    with open(service.home / f"{part}.log", "ab") as log, _usual_signals():
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *port],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
            env=environment_of(service) | own,
            start_new_session=True,
        )
    service = replace(service, started={**service.started, part: (process.pid, birth(psutil.Process(process.pid)))})
    _write(service)
    return service


@contextmanager
def _usual_signals() -> Iterator[None]:
    """For what is started inside the block: a shell starts its background jobs with SIGINT ignored; Prefect turns SIGTERM into SIGINT and
    could then not be stopped."""
    ignored = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def environment_of(service: Service) -> dict[str, str]:
    """Of every part, and so of every flow run; the user's own settings win where they do no harm."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in (AUTH, DATABASE, "MAKEFLAGS", "MAKEOVERRIDES", "PREFECT_PROFILE")
    }
    return {
        **inherited,
        **service.environment,
        **past_the_proxy(),
        "PREFECT_HOME": str(service.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # what ended 90 days ago goes; the store keeps its manifests
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_PLUGINS_ENABLED": "false",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XTUNER_STORE": str(service.store),
        "XTUNER_RECIPE": service.recipe,
        MARK: str(service.home),
    }


def past_the_proxy() -> dict[str, str]:
    """The variables that keep what is meant for our server from this environment's proxy; none if there is none, or they are set."""
    if not urllib.request.getproxies() or urllib.request.proxy_bypass(HOST):
        return {}
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{hosts},{HOST}" if hosts else HOST)


def _write(service: Service) -> None:
    for name, secret in {"auth": service.auth, "database": service.database}.items():
        if secret:
            with open(os.open(service.home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                file.write(secret)
    kept = asdict(service)
    write_json(
        service.home / "service.json",
        {name: str(kept[name]) for name in ("store", "recipe")} | {"port": service.port, "started": kept["started"]},
    )


def _healthy(service: Service) -> Service:
    """With a server that answers. One that ends at once is started again: on a busy machine the database may be locked for a moment."""
    for _ in range(SERVER_STARTS):
        service = start(service, "server")
        if _gets_healthy(service):
            return service
        if "server" in service.pids:  # it had its time
            break
    log = service.home / "server.log"
    raise StorageError(f"the server did not get healthy. The end of {log}:\n{tail(log)}")


def _gets_healthy(service: Service) -> bool:
    deadline = time.monotonic() + STARTUP_SECONDS
    while "server" in service.pids and time.monotonic() < deadline:
        if is_healthy(service):
            return True
        time.sleep(0.2)
    return False


def is_healthy(service: Service) -> bool:
    try:
        with _DIRECT.open(f"{service.api}/health", timeout=10) as answer:
            return answer.status == 200
    except (OSError, HTTPException):  # the latter of a program that speaks something else
        return False


def down(home: Path) -> list[str]:
    """Stop what `up` started and all that it started: flow runs first, in order, then watcher, worker, server; says what was stopped."""
    with locked(home):
        service = read(home)
        if service is None:
            return []
        stopped = stop(service, tuple(PARTS))
        end(marked(MARK, str(home)), GRACE_SECONDS)
        for file in ("service.json", "auth"):
            (home / file).unlink(missing_ok=True)
        return stopped


def stop(service: Service, names: Collection[str]) -> list[str]:
    """End these parts, and with the worker its flow runs, which come first and save checkpoints; says what was stopped."""
    alive = {name: process for name, (pid, born) in service.started.items() if (process := living(pid, born))}
    parts = {name: process for name, process in alive.items() if name in names}
    runs = [process for process in marked(MARK, str(service.home)) if process not in alive.values()] if "worker" in names else []
    with frozen(parts["worker"]) if "worker" in parts else nullcontext():  # it must take no new run, nor hurry the running ones
        end(runs, RUN_GRACE_SECONDS)
        for name in reversed(PARTS):
            if name in parts:
                end([parts[name]], GRACE_SECONDS)
    return [*(["flow runs"] if runs else []), *parts]


@contextmanager
def locked(home: Path, wait: float = 0) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(home / ".lock", timeout=wait):
            yield
    except Timeout:
        raise RecipeError(f"{home}: another up or down is at work there; wait for it.") from None


app = App(name="python -m flows.service")
Home = Annotated[Path, Parameter(help="Folder of the service: Prefect's home, its database, logs.")]
DEFAULT_HOME = PROJECT / ".service"


@app.command(name="up")
def _up(*, recipe: str, store: Path = Path("artifacts"), port: int | None = None, home: Home = DEFAULT_HOME) -> None:
    service = up(home.resolve(), store, recipe, port, os.environ.get(AUTH) or None, os.environ.get(DATABASE) or None)
    if port is None and service.port != PORT:
        print(f"(port {PORT} is taken or this service had another one: it listens on {service.port})")
    print(f"Prefect's pages: {service.ui}\nlogs: {service.home}/*.log\n\nexport PREFECT_API_URL={service.api}")
    if service.auth:
        print("export PREFECT_API_AUTH_STRING=...   # the user:password you gave as AUTH; the browser asks for it too")
    for name, hosts in past_the_proxy().items():
        print(f"export {name}={hosts}")
    print("prefect deployment run finetune-flow")


@app.command(name="down")
def _down(*, home: Home = DEFAULT_HOME) -> None:
    stopped = down(home.resolve())
    print(f"stopped: {', '.join(stopped)}" if stopped else f"nothing of {home} runs")


@app.command(name="status")
def _status(*, home: Home = DEFAULT_HOME) -> int:
    service = read(home.resolve())
    if service is None:
        print(f"down; start it with `xtuner up` ({home})")
        return 1
    for part in service.started:
        print(f"{part:<8} {f'runs, process {service.pids[part]}' if part in service.pids else 'is gone: `xtuner up` starts it again'}")
    healthy = is_healthy(service)
    print(f"{service.ui} {'answers' if healthy else 'does not answer'}\nstore:  {service.store}\nrecipe: {service.recipe}")
    print(f"logs:   {service.home}/*.log")
    return 0 if healthy and len(service.pids) == len(service.started) else 1


def main() -> int:
    """Run a command; a user's mistake is told without a traceback."""
    try:
        return app(result_action="return_value") or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run `xtuner up` again to go on, or `xtuner down`.", file=sys.stderr)
        return Interrupted.exit_code


if __name__ == "__main__":
    sys.exit(main())
