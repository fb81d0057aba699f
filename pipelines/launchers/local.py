"""Start the training processes on this machine with torchrun."""

from __future__ import annotations

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import environment_here, torchrun
from xtuner_core.errors import RecipeError


def check(launch: LaunchConfig) -> None:
    """RecipeError if the recipe wants more than this machine."""
    if launch.nodes > 1:
        raise RecipeError(f"launcher local starts processes on this machine only, and launch.nodes is {launch.nodes}: set train.launcher.")


def command(job: Job) -> list[str]:
    """torchrun; `--standalone` takes a free port of its own."""
    return torchrun(["--standalone"], job)


def environment(job: Job) -> dict[str, str]:
    return environment_here(job.per_node)


def described(job: Job) -> str:
    return f"{job.processes} {'process' if job.processes == 1 else 'processes'} on this machine"
