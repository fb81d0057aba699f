"""Several machines that somebody else starts: this one runs its torchrun agent, the others run a script that lies in the store.

For clusters that run a command on every machine, and by hand. When one machine is told to stop, all save a checkpoint and end.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import carried, environment_here, meeting, require_rendezvous, torchrun


def check(launch: LaunchConfig) -> None:
    require_rendezvous(launch, "torchrun")


def command(job: Job) -> list[str]:
    """This machine's agent, which hosts the rendezvous; the script for the others is written beside the settings."""
    _script(job).write_text(script(job), encoding="utf-8")
    return torchrun([*_meeting(job), f"--local-addr={str(job.launch.rendezvous).partition(':')[0]}"], job)


def environment(job: Job) -> dict[str, str]:
    return environment_here(job.per_node)


def described(job: Job) -> str:
    where = "another machine" if job.launch.nodes == 2 else f"{job.launch.nodes - 1} other machines"
    return f"to take part, run on {where} within {job.launch.join_minutes} min: {shlex.join(['sh', str(_script(job))])}"


def script(job: Job) -> str:
    """What the other machines run; they need the same Python and the same store at the same paths.

    Their output joins ours, for any machine may turn out to hold rank 0, whose lines are followed.
    """
    settings = [f"{name}={value}" for name, value in carried(environment(job)).items()]
    agent = shlex.join(["env", *settings, *torchrun(_meeting(job), job)])
    return f"#!/bin/sh\necho {shlex.quote(f'taking part; output: {job.log}')}\nexec {agent} >> {shlex.quote(str(job.log))} 2>&1\n"


def _script(job: Job) -> Path:
    return job.config.with_name("join.sh")


def _meeting(job: Job) -> list[str]:
    return meeting(job, job.launch.rendezvous)
