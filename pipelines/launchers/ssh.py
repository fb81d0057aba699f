"""Several machines that ssh reaches without asking for a password: this one and `launch.hosts`.

As a program: python -m pipelines.launchers.ssh HOST,HOST ADDRESS LOG COMMAND... runs the command here and, under a supervisor, on every
host, until all have ended; their output joins LOG. Sent SIGTERM it stops the command here; the processes of a training agree on that
among themselves, so that the others save the same checkpoint and end by themselves, or are ended a little later. If the connection breaks,
the supervisor there ends what it started.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from pipelines import supervisor
from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import SHUTDOWN_SECONDS, carried, environment_here, meeting, require_rendezvous, torchrun
from xtuner_core.errors import RecipeError

_AFTER_THE_FIRST_SECONDS = 3
"""How long the rest may take once one has ended: all leave the training at the same step."""


def check(launch: LaunchConfig) -> None:
    """RecipeError if hosts, rendezvous or ssh is missing."""
    require_rendezvous(launch, "ssh")
    if launch.nodes != 1 + len(launch.hosts):
        machines = 1 + len(launch.hosts)
        raise RecipeError(f"launcher ssh: launch.nodes is {launch.nodes}, but this machine and launch.hosts are {machines}.")
    if shutil.which("ssh") is None:
        raise RecipeError("launcher ssh: this machine has no program ssh.")


def command(job: Job) -> list[str]:
    here = torchrun(meeting(job, job.launch.rendezvous), job)
    return [sys.executable, "-m", __name__, ",".join(job.launch.hosts), str(job.launch.rendezvous).partition(":")[0], str(job.log), *here]


def environment(job: Job) -> dict[str, str]:
    return environment_here(job.per_node)


def described(job: Job) -> str:
    return f"{job.processes} processes, {job.per_node} each on this machine and on {', '.join(job.launch.hosts)}"


def on_host(host: str, agent: Sequence[str], environment: Mapping[str, str], log: str) -> list[str]:
    """The ssh command that runs an agent there, with the few variables it needs.

    It has a terminal (-tt), so that a broken connection is told, but writes to the log: not to something that may be gone.
    """
    settings = [f"{name}={value}" for name, value in carried(environment).items()]
    supervised = [sys.executable, "-I", supervisor.__file__, str(SHUTDOWN_SECONDS + 2), "0"]
    there = ["env", *settings, *supervised, *_known_as(host.rpartition("@")[2], agent)]
    quiet = ["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ServerAliveInterval=15"]
    return ["ssh", "-tt", *quiet, "--", host, f"{shlex.join(there)} >> {shlex.quote(log)} 2>&1"]


def _known_as(address: str, agent: Sequence[str]) -> list[str]:
    """The agent with the name by which the other machines reach it."""
    end = agent.index("torch.distributed.run") + 1
    return [*agent[:end], f"--local-addr={address}", *agent[end:]]


def together(here: Sequence[str], there: Sequence[Sequence[str]]) -> int:
    """Run all commands until they have ended; 0 if all did well."""
    # In sessions of their own, because SIGTERM comes to our whole group; only the first is told, and only once: twice means at once.
    first, *rest = (subprocess.Popen(one, stdin=subprocess.DEVNULL, start_new_session=True) for one in (here, *there))

    def stop(number: int, frame: FrameType | None) -> None:
        first.terminate()

    signal.signal(signal.SIGTERM, stop)
    while all(one.poll() is None for one in (first, *rest)):
        time.sleep(0.2)
    deadline = time.monotonic() + _AFTER_THE_FIRST_SECONDS
    for one in (first, *rest):
        _end(one, deadline)
    return int(any(one.returncode for one in (first, *rest)))


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def main() -> int:
    hosts, address, log, *agent = sys.argv[1:]
    return together(_known_as(address, agent), [on_host(host, agent, os.environ, log) for host in hosts.split(",")])


if __name__ == "__main__":
    sys.exit(main())
