"""The server on PostgreSQL: runs that overlap do not wait for a lock of its database, and its password stays in one file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.service import Service, environment_of, is_healthy, read
from tests.service.conftest import TINY, free_port

PASSWORD = "canary-of-the-database"
FLOW = """
from prefect import flow, task

@task
def step(number):
    return number

@flow
def many_steps():
    return sum(future.result() for future in [step.submit(number) for number in range(60)])

assert many_steps() == 1770
"""


def postgres_programs() -> Path:
    found = shutil.which("postgres") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")), default=None)
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    return Path(found).resolve().parent


@contextmanager
def postgres() -> Iterator[str]:
    """A new database cluster on loopback, of a user other than root, who may not run one; the URL of its database."""
    programs, port = postgres_programs(), free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if as_user:
            shutil.chown(folder, "postgres")
            shutil.chown(folder / "password", "postgres")
        new = [programs / "initdb", "--no-sync", "--username=prefect", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        subprocess.run([*as_user, *new, folder / "data"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        listen = ["-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
        server = subprocess.Popen([*as_user, programs / "postgres", "-D", folder / "data", *listen], stderr=subprocess.DEVNULL, cwd="/")
        try:
            ready = [programs / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={port}"]
            deadline = time.monotonic() + 60
            while subprocess.run(ready).returncode:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            yield f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
            server.wait(60)


@contextmanager
def server_on(url: str, home: Path) -> Iterator[Service]:
    """In the foreground, as systemd starts it; SIGTERM ends it."""
    settings = {"RECIPE": TINY, "STORE": home / "store", "HOME": home, "PORT": free_port(), "DATABASE_URL": url}
    environment = {**os.environ, **{f"XTUNER_{name}": str(value) for name, value in settings.items()}}
    with subprocess.Popen([sys.executable, "-m", "flows.foreground", "server"], env=environment) as foreground:
        deadline = time.monotonic() + 180
        try:
            while not ((service := read(home)) and is_healthy(service)):
                assert foreground.poll() is None and time.monotonic() < deadline, (home / "server.log").read_text()
                time.sleep(0.2)
            yield service
        finally:
            foreground.terminate()
            assert foreground.wait(60) == 0
    assert not service.pids


@pytest.mark.slow
def test_runs_overlap_on_postgresql_and_its_password_stays_in_one_file(tmp_path: Path) -> None:
    with postgres() as url:
        with server_on(url, tmp_path) as service:
            command, environment = [sys.executable, "-c", FLOW], environment_of(service)
            runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
            told = [run.communicate(timeout=300)[0].decode() for run in runs]
            assert [run.returncode for run in runs] == [0, 0], told
        assert "locked" not in (tmp_path / "server.log").read_text()
        assert not list(tmp_path.rglob("*.db")), "the history is in PostgreSQL, not in SQLite"
        holding = [file for file in tmp_path.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]
        assert holding == [tmp_path / "database"] and holding[0].stat().st_mode & 0o777 == 0o600
        assert not any(PASSWORD in text for text in told)
