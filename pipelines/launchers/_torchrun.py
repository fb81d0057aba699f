"""torchrun's arguments and environment, which all launchers share."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from pipelines.launch import Job, LaunchConfig
from xtuner_core.determinism import DETERMINISTIC, USE_FA3
from xtuner_core.errors import RecipeError

SHUTDOWN_SECONDS = 20
"""How long ranks get to save a checkpoint after SIGTERM (Prefect itself allows 30 s in all)."""
_CARRIED = (DETERMINISTIC, USE_FA3, "HF_HUB_OFFLINE", "PYTHONPATH")
_CARRIED_FAMILIES = ("OMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_", "TOKENIZERS_", "CUBLAS_", "NCCL_", "GLOO_", "TORCH_NCCL_")


def torchrun(place: Sequence[str], job: Job, python: str = sys.executable) -> list[str]:
    """The argument list of one machine's agent; `place` says where the machines meet."""
    agent = [python, "-m", "torch.distributed.run", *place, f"--nproc-per-node={job.per_node}"]
    agent += [f"--max-restarts={job.launch.max_restarts}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    return [*agent, "-m", "xtuner_core.sft", "--config", str(job.config)]


def meeting(job: Job, endpoint: str | None) -> list[str]:
    """Where the agents of several machines meet: at a store that the machine of the endpoint hosts; None: said later."""
    where = [f"--rdzv-endpoint={endpoint}"] if endpoint else []
    wait = f"--rdzv-conf=join_timeout={60 * job.launch.join_minutes}"
    return [f"--nnodes={job.launch.nodes}", "--rdzv-backend=c10d", *where, f"--rdzv-id={job.name}", wait]


def defaults(threads: int) -> dict[str, str]:
    """Variables that make ranks faster, unless the user sets them.

    glibc returns every large tensor to the kernel and gets it back page by page; keeping freed memory makes CPU steps about a fifth
    faster.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "GOMP_SPINCOUNT": "100000",  # waiting threads spin a tenth of a millisecond, then sleep: nearly free alone, fair beside others
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages: another tenth
        "TOKENIZERS_PARALLELISM": "false",
    }


def environment_here(processes: int) -> dict[str, str]:
    """This process's environment, with the cores of this machine shared out among so many ranks."""
    return {**defaults(len(os.sched_getaffinity(0)) // processes), **os.environ, "PYTHONUNBUFFERED": "1"}


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other machines need of an environment: what decides bytes, speed and network. Nothing else, for it may be secret."""
    names = sorted(name for name in environment if name in _CARRIED or name.startswith(_CARRIED_FAMILIES))
    return {name: environment[name] for name in names} | {"PYTHONUNBUFFERED": "1"}


def require_rendezvous(launch: LaunchConfig, launcher: str) -> None:
    """RecipeError unless the recipe says where the machines meet."""
    if launch.rendezvous is None:
        raise RecipeError(f"launcher {launcher}: set launch.rendezvous to HOST:PORT, this machine's name as the others reach it.")
