"""Several machines that somebody else starts: this one runs its torchrun agent, and the log says what to run on the others.

For clusters that run a command on every machine, and by hand. When one machine is told to stop, all save a checkpoint and end.
"""

from __future__ import annotations

import shlex

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import carried, environment_here, meeting, require_rendezvous, torchrun


def check(launch: LaunchConfig) -> None:
    require_rendezvous(launch, "torchrun")


def command(job: Job) -> list[str]:
    """This machine's agent, which hosts the rendezvous."""
    return torchrun([*_meeting(job), f"--local-addr={str(job.launch.rendezvous).partition(':')[0]}"], job)


def environment(job: Job) -> dict[str, str]:
    return environment_here(job.per_node)


def described(job: Job) -> str:
    others = job.launch.nodes - 1
    return f"waiting {job.launch.join_minutes} min for {others} more {'machine' if others == 1 else 'machines'}; run there: {_by_hand(job)}"


def _by_hand(job: Job) -> str:
    """What the other machines run; they need the same Python and the same store at the same paths."""
    settings = [f"{name}={value}" for name, value in carried(environment(job)).items()]
    return shlex.join(["env", *settings, *torchrun(_meeting(job), job)])


def _meeting(job: Job) -> list[str]:
    return meeting(job, job.launch.rendezvous)
