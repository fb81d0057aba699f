"""One training on two machines, each of which is an agent on this one: as on one machine, and after a death as if nothing had happened.

torchrun runs as it is; ssh is a stand-in that runs its command here, as sshd would there; Slurm is a real cluster of two nodes, where
its programs are installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from pipelines import train
from pipelines.recipe import PROJECT, load_recipe
from pipelines.stage import Work
from xtuner_core.checkpoint.store import newest
from xtuner_core.errors import Interrupted

pytestmark = pytest.mark.slow


@dataclass
class Operator:
    """Who reads the stage's log: starts the other machine's agent when asked to, and does something at the first step that is told."""

    at_a_step: Callable[[Operator], None] = lambda operator: None
    agent: subprocess.Popen[bytes] | None = None
    lines: list[str] = field(default_factory=list)

    def log(self, line: str) -> None:
        self.lines.append(line)
        if "run on another machine" in line:
            self.agent = subprocess.Popen(shlex.split(line.rpartition("min: ")[2]), cwd=PROJECT)

    def progress(self, done: float, where: str) -> None:
        self.at_a_step(self)


def lose_the_other_machine(operator: Operator) -> None:
    """All its processes at once."""
    if operator.agent and operator.agent.poll() is None:
        agent = psutil.Process(operator.agent.pid)
        for process in [agent, *agent.children(recursive=True)]:
            process.kill()


def cancel(operator: Operator) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def train_with(
    tiny_model_folder: Path, tiny_data: Path, prepare_place: Callable[[], Work]
) -> Iterator[Callable[[Operator, list[str], Work | None], Work]]:
    """Train with two processes in a place, a new one if none is given; one thread each, for how many there are decides their sums."""

    def train_with(operator: Operator, changes: list[str], place: Work | None = None) -> Work:
        inputs = {"base": tiny_model_folder.parent, "data": tiny_data}
        work = replace(place or prepare_place(), inputs=inputs, log=operator.log, progress=operator.progress)
        try:
            train.run(load_recipe("qwen3_tiny_full_openai", ("train.processes=2", *changes)), work)
        except (KeyboardInterrupt, Interrupted):
            operator.lines.append("interrupted")
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield train_with


def digest(work: Work) -> str:
    files = sorted(path for path in (work.payload / "checkpoint").rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def one_machine(train_with: Callable[..., Work]) -> str:
    return digest(train_with(Operator(), []))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nothing_runs() -> bool:
    """Within half a minute: the other machines' agents are not ours to wait for."""
    deadline = time.monotonic() + 30
    while _trains() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not _trains()


def _trains() -> bool:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # also one that ended, and that nobody waits for
            if "xtuner_core.sft" in child.cmdline():
                return True
    return False


def meeting() -> list[str]:
    return ["launch.nodes=2", f"launch.rendezvous=localhost:{free_port()}", "launch.join_minutes=4"]


def test_a_lost_machine_stops_the_others_and_the_next_run_ends_with_the_bytes_of_one_machine(
    train_with: Callable[..., Work], one_machine: str
) -> None:
    first, second = Operator(lose_the_other_machine), Operator()
    work = train_with(first, ["train.launcher=torchrun", *meeting()])
    assert first.lines[-1] == "interrupted" and nothing_runs()
    assert digest(train_with(second, ["train.launcher=torchrun", *meeting()], work)) == one_machine
    assert second.agent and second.agent.wait(60) == 0


def test_ssh_cancelled_saves_a_checkpoint_and_goes_on_from_it(
    train_with: Callable[..., Work], one_machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    stand_in.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _cancelled_and_continued(train_with, ["train.launcher=ssh", "launch.hosts=[localhost]", *meeting()], one_machine)


def test_slurm_cancelled_saves_a_checkpoint_and_goes_on_from_it(
    train_with: Callable[..., Work], one_machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "srun"))):
        pytest.skip("Slurm's daemons are not installed, or may not be started")
    with ExitStack() as cluster:
        monkeypatch.setenv("SLURM_CONF", str(slurm_cluster(tmp_path, cluster)))
        slurm = ["train.launcher=slurm", "launch.nodes=2", "launch.gpus_per_node=0", "launch.time_limit=30"]
        _cancelled_and_continued(train_with, [*slurm, "launch.slurm.options=[--exclusive]"], one_machine)
        assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout == ""


def _cancelled_and_continued(train_with: Callable[..., Work], changes: list[str], one_machine: str) -> None:
    first, second = Operator(cancel), Operator()
    work = train_with(first, changes)
    assert first.lines[-1] == "interrupted" and nothing_runs()
    assert newest(work.scratch)
    assert digest(train_with(second, changes, work)) == one_machine
    assert any("resum" in line for line in second.lines), second.lines


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{nodes}-{last}] CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def slurm_cluster(folder: Path, cluster: ExitStack) -> Path:
    """Two nodes on this machine, each named by an address of it; the file of settings."""
    host, conf = socket.gethostname().partition(".")[0], folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, controller=free_port(), nodes=(first := free_port()), last=first + 1))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed", "log-file": "munged.log"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    for daemon in (
        munged,
        ["slurmctld", "-D", "-f", conf],
        *(["slurmd", "-D", "-f", conf, "-N", node] for node in ("127.0.0.1", "127.0.0.2")),
    ):
        with open(folder / "daemons.log", "ab") as log:
            process = subprocess.Popen(daemon, stdout=log, stderr=log, start_new_session=True)
        cluster.callback(process.wait, 60)
        cluster.callback(process.send_signal, signal.SIGTERM)
        time.sleep(0.5)
    deadline = time.monotonic() + 60
    states = ["sinfo", "--noheader", "--Node", "--format=%t"]
    while (
        subprocess.run(states, capture_output=True, text=True, env={**os.environ, "SLURM_CONF": str(conf)}).stdout.split() != ["idle"] * 2
    ):
        assert time.monotonic() < deadline, (folder / "daemons.log").read_text()
        time.sleep(0.3)
    return conf
