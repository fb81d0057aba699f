"""What `make up` hands to the service, and the service to its parts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flows.service import Service, environment_of
from pipelines.recipe import PROJECT

SECRETS = {"AUTH": "someone:canary-of-auth", "DATABASE_URL": "postgresql+asyncpg://prefect:canary-of-database@127.0.0.1/prefect"}


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_make_up_hands_its_passwords_to_the_service_and_to_nothing_that_it_starts(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "xtuner"
    stand_in.write_text("#!/bin/sh\nenv -0\n")
    stand_in.chmod(0o700)
    (tmp_path / "ready").touch()
    given = [f"{name}={secret}" for name, secret in SECRETS.items()]
    command = ["make", "--silent", "up", f"BIN={tmp_path}", f"READY={tmp_path / 'ready'}", *(given if by == "argument" else [])]
    env = {"PATH": os.environ["PATH"], **(SECRETS if by == "environment" else {})}
    told = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True).stdout
    handed = dict(one.split("=", 1) for one in told.strip("\0\n").split("\0"))
    assert {name: handed[f"XTUNER_{name}"] for name in SECRETS} == SECRETS
    monkeypatch.setattr(os, "environ", handed)
    inherited = environment_of(Service(tmp_path, 4200, tmp_path, "recipe", {}))
    assert [name for name, value in inherited.items() if "canary" in value] == []
