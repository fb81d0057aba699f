"""Where training processes run: the recipe's section `launch`, and what a launcher is asked to start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from xtuner_core.config import Config

_WORD = r"^[A-Za-z0-9][A-Za-z0-9._,-]*$"
_DNS_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
Host = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*$")]


class SlurmConfig(Config):
    """What launcher slurm asks of the cluster beside nodes, GPUs, processors, memory and time."""

    partition: str | None = Field(default=None, pattern=_WORD, description="Partition; the cluster's default if not given.")
    account: str | None = Field(default=None, pattern=_WORD, description="Account that pays; the user's default if not given.")
    options: tuple[str, ...] = Field(
        default=(), description="More options of srun, each as --name or --name=value, of those that choose resources: --qos=high, say."
    )


class KubernetesConfig(Config):
    """Where launcher kubernetes runs the pods; kubectl's current context says in which cluster."""

    image: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]*$",
        description="Container image that holds this project (deploy/Containerfile); one must be given.",
    )
    namespace: str = Field(default="default", pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", description="Namespace of everything made.")
    claim: str | None = Field(
        default=None, pattern=_DNS_NAME, description="Persistent volume claim (ReadWriteMany) that holds the store; one must be given."
    )
    mount: str | None = Field(
        default=None, pattern=r"^/[^\x00-\x1f:$]+$", description="Folder where that volume is mounted, here as in the pods; must be given."
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that nodes must have.")


class LaunchConfig(Config):
    """On which machines train.processes run. None of it decides the result: only how many processes there are in all does.

    With more than one machine the store must lie on a file system that all of them see at the same path.
    """

    nodes: int = Field(default=1, ge=1, description="Machines; train.processes is the number of processes on all of them together.")
    rendezvous: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*:\d{1,5}$",
        description="HOST:PORT of this machine as the others reach it, where the processes meet (launchers torchrun and ssh).",
    )
    hosts: tuple[Host, ...] = Field(default=(), description="The other machines, as ssh knows them (launcher ssh).")
    join_minutes: int = Field(default=30, ge=1, description="How long machines wait for each other before the run is given up.")
    max_restarts: int = Field(
        default=0, ge=0, description="How often the processes start again from their last checkpoint when some of them died."
    )
    gpus_per_node: int | None = Field(
        default=None, ge=0, description="GPUs asked of the cluster for each node: one a process if not given; 0 trains on processors."
    )
    cpus_per_node: int | None = Field(default=None, ge=1, description="Processors asked of the cluster for each node.")
    memory_per_node: str | None = Field(
        default=None, pattern=r"^[1-9]\d*[MGT]$", description="Memory asked of the cluster for each node, such as 64G."
    )
    time_limit: int | None = Field(
        default=None, ge=2, description="Minutes after which the cluster ends the training, which saves a checkpoint before."
    )
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()


@dataclass(frozen=True, slots=True)
class Job:
    """One training to start: `processes` in all, on `launch.nodes` machines."""

    config: Path
    """The engine's settings; this file and all it names must be readable on every machine."""
    log: Path
    """Where the output goes."""
    processes: int
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def per_node(self) -> int:
        return self.processes // self.launch.nodes

    @property
    def gpus_per_node(self) -> int:
        return self.per_node if self.launch.gpus_per_node is None else self.launch.gpus_per_node

    @property
    def name(self) -> str:
        """The same for every attempt at the same artifact of the same store, so that a new one finds what an earlier one left."""
        return f"xtuner-{hashlib.sha256(str(self.config).encode()).hexdigest()[:16]}"
