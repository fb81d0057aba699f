"""Processes and their device mesh."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xtuner_core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one: NCCL with one GPU each, else gloo on the CPU.

    Raises:
        RecipeError: there are more processes than GPUs.
    """
    cuda = torch.cuda.is_available()
    device = device_of(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if cuda else 0)
    if cuda:
        torch.cuda.set_device(device)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
    launched = "WORLD_SIZE" in os.environ
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30), **({} if launched else alone))
    try:
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("data",)))
    finally:
        dist.destroy_process_group()


def device_of(local_rank: int, gpus: int) -> torch.device:
    """The device of a process by its number on this machine: a GPU of its own, or the CPU if there are none.

    Raises:
        RecipeError: no GPU is left for it.
    """
    if not gpus:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise RecipeError(
            f"process {local_rank + 1} on this machine has no GPU: there {'is' if gpus == 1 else 'are'} {gpus}, and each needs one. "
            f"Set train.processes or --nproc-per-node to {gpus} or less, or look at CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", local_rank)


def leave(code: int) -> NoReturn:
    """End the process without the clean-up of Python's interpreter.

    A thread of gloo may still let go of the last exchange's tensors, for which it needs the interpreter; one that is being cleaned up
    ends such a thread in a way that aborts the process (status -6 after a training that was finished: 2 of 36 small runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sharding_mesh(world: World, sharding_size: int | None) -> DeviceMesh:
    """Over which processes the model is spread: all of them, or groups of `sharding_size` neighbours that each hold one copy (HSDP).

    Raises:
        RecipeError: the groups would not be of equal size.
    """
    if sharding_size is None or sharding_size == world.size:
        return world.mesh
    if world.size % sharding_size:
        raise RecipeError(
            f"train.fsdp.sharding_size ({sharding_size}): {world.size} processes cannot be divided into groups of that size; "
            "give a divisor of their number, or leave it out to spread one copy over all of them."
        )
    return init_device_mesh(world.device.type, (world.size // sharding_size, sharding_size), mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(value: float, world: World) -> float:
    """The sum of a number over all ranks. It is on the host and stays there (over gloo), so that no GPU is waited for."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def gather_numbers(values: Sequence[int], world: World, group: dist.ProcessGroup | None = None) -> list[int]:
    """The integers of all ranks, rank after rank; every rank gets them, over `group` if it is not the default one."""
    own = torch.tensor([len(values), *values], dtype=torch.int64)
    longest = torch.tensor(len(own))
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    padded = torch.nn.functional.pad(own, (0, int(longest) - len(own)))
    rows = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(rows, padded, group=group)
    return [number for row in rows for number in row[1 : 1 + int(row[0])].tolist()]


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    return sum_over_ranks(float(flag), world) > 0


def any_of_each(flags: Sequence[bool], world: World) -> list[bool]:
    """For each flag whether it is set on any rank, in one message; every rank gets the same answers."""
    counts = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]
