"""What is in deploy/: units that systemd takes without a complaint, and containers that run as nobody special and open no port."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.recipe import PROJECT

UNITS = sorted((PROJECT / "deploy" / "systemd").glob("*.service"))
PARTS = {"server", "worker", "watch", "deploy"}
SETTINGS = dict(re.findall(r"^#?(\w+)=(.*)$", (PROJECT / "deploy" / "service.env.example").read_text(), re.MULTILINE))


def part_of(command: str) -> str:
    return command.rpartition("-m flows.foreground ")[2]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    """It exits with 0 also where it complains."""
    python = tmp_path / "xtuner" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    own = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    verified = subprocess.run(["systemd-analyze", "verify", "--user", "--man=no", *UNITS], env=own, capture_output=True, text=True)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_every_part_has_a_unit_and_a_container() -> None:
    commands = [re.search(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE) for unit in UNITS]
    assert {part_of(command[1]) for command in commands if command} == PARTS
    services = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())["services"]
    assert {name: part_of(" ".join(one["command"])) for name, one in services.items()} == {part: part for part in PARTS}
    assert not any("ports" in one or one.get("privileged") for one in services.values())


def test_the_example_names_what_the_program_reads() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "flows.foreground", "--help"], capture_output=True, text=True, cwd=PROJECT, check=True
    ).stdout
    read = {name for name in SETTINGS if name in told}
    assert read == {"XTUNER_RECIPE", "XTUNER_STORE", "XTUNER_HOME", "XTUNER_PORT"}
    assert set(SETTINGS) - read == {"XTUNER_AUTH", "XTUNER_DATABASE_URL"}


def test_the_image_runs_as_a_user_and_takes_torch_first() -> None:
    lines = (PROJECT / "deploy" / "Containerfile").read_text().splitlines()
    user, torch, rest = (next(at for at, line in enumerate(lines) if word in line) for word in ("USER xtuner", "^torch==", "--editable"))
    assert user < torch < rest and not any(line.startswith("USER root") for line in lines[user:])
    ignored = (PROJECT / ".dockerignore").read_text().split()
    assert {".venv", ".service", "artifacts", "deploy/service.env"} <= set(ignored)
