"""Lay weights out as DeepSpeed's ZeRO does (runtime/zero/stage_1_and_2.py, stage3.py, runtime/engine.py of 0.19.8)."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


class LossScaler:
    """Pickles as DeepSpeed's does."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int, Enum):
    """Pickles as DeepSpeed's does."""

    gradients = 2
    weights = 3


@contextmanager
def deepspeed_named() -> Iterator[None]:
    """While files are written, the classes go by DeepSpeed's names."""
    places = {LossScaler: "deepspeed.runtime.fp16.loss_scaler", ZeroStageEnum: "deepspeed.runtime.zero.config"}
    before = {kind: kind.__module__ for kind in places}
    for kind, name in places.items():
        module = ModuleType(name)
        setattr(module, kind.__name__, kind)
        kind.__module__ = name
        for count in range(1, name.count(".") + 1):
            sys.modules.setdefault(".".join(name.split(".")[:count]), ModuleType("deepspeed"))
        sys.modules[name] = module
    try:
        yield
    finally:
        for kind, name in before.items():
            kind.__module__ = name
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]


def padded(numbers: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([numbers, torch.zeros(-len(numbers) % multiple)])


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def write_zero(
    folder: Path, stage: int, world: int, groups: list[Weights], frozen: Weights, buffers: Weights, shared: dict[str, str], **client: Any
) -> None:
    """`groups` are the optimizer's; `shared` maps a second name to the first; `client` is what the trainer adds."""
    folder.mkdir(parents=True)
    kept = [{name: fragment(one, rank, world) if stage == 3 else one for name, one in frozen.items()} for rank in range(world)]
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups]
    with deepspeed_named():
        for rank in range(world):
            model = {
                "module": {} if stage == 3 else {name: one.bfloat16() for group in groups for name, one in group.items()},
                "buffer_names": list(buffers), "optimizer": None, "param_shapes": shapes, "shared_params": shared,
                "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in frozen.items()),
                "frozen_param_fragments": OrderedDict(kept[rank]),
                "ds_config": {"zero_optimization": {"stage": stage}}, "ds_version": "0.19.8", "dp_world_size": world, **client,
            }  # fmt: skip
            model["module"] |= buffers
            if stage == 3 or rank == 0:
                name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
                torch.save(model, folder / name)
            parts = stage_3(groups, rank, world) if stage == 3 else stage_2(groups, rank, world)
            optimizer = {"loss_scaler": LossScaler(), "overflow": False, **parts}
            torch.save({"optimizer_state_dict": optimizer}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def fragment(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return padded(tensor.flatten(), world).chunk(world)[rank].clone()


def stage_2(groups: list[Weights], rank: int, world: int) -> dict[str, Any]:
    """A group is one row, padded to twice the world's size and cut into one part a rank; the last part is saved without its padding."""
    parts = []
    for group in groups:
        row = flat(group)
        part = padded(row, 2 * world).chunk(world)[rank]
        parts.append(part[: max(0, len(row) - rank * len(part))].clone())
    return {"zero_stage": 2, "partition_count": [world] * len(groups), "single_partition_of_fp32_groups": parts}


def stage_3(groups: list[Weights], rank: int, world: int) -> dict[str, Any]:
    """Every parameter is padded and cut into one part a rank; a rank's parts of a group lie behind each other."""
    parts = [torch.cat([fragment(tensor, rank, world) for tensor in group.values()]) for group in groups]
    return {"zero_stage": ZeroStageEnum.weights, "partition_count": world, "fp32_flat_groups": parts}
