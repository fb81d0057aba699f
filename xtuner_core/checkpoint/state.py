"""What a checkpoint holds: tensors by name. Everything that is not a tensor goes to its JSON file.

Keys: `model.<name>` (trained parameters), `optim.<name>`, `rng.<rank>.<device>`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from xtuner_core.parallel.mesh import World

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


def trained_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The trained parameters by their name in the model; tied names appear once. They share memory with the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def collect(model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World) -> dict[str, torch.Tensor]:
    """All tensors of a resumable checkpoint; loading into them changes model weights in place."""
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    tensors |= {f"optim.{name}": value for name, value in _optimizer_state(model, optimizer).items() if torch.is_tensor(value)}
    tensors[f"rng.{world.rank}.cpu"] = torch.get_rng_state()
    if world.device.type == "cuda":
        tensors[f"rng.{world.rank}.cuda"] = torch.cuda.get_rng_state(world.device)
    return tensors


def without_random_streams(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors but for the states of random generators."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}


def restore(model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World, tensors: dict[str, torch.Tensor]) -> None:
    """Hand the tensors that were loaded into `collect`'s places to the optimizer and, if they are among them, the random generators."""
    state: dict[str, Any] = {name: tensors.get(f"optim.{name}", value) for name, value in _optimizer_state(model, optimizer).items()}
    set_optimizer_state_dict(model, optimizer, state, options=_OPTIONS)
    if (cpu := tensors.get(f"rng.{world.rank}.cpu")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := tensors.get(f"rng.{world.rank}.cuda")) is not None:
        torch.cuda.set_rng_state(cuda, world.device)


def _optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All entries, also before the first update: torch then makes them by one with zero gradients, which must not count."""
    fresh = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    if fresh:
        for entries in optimizer.state.values():
            if "step" in entries:
                entries["step"].zero_()
        state = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return dict(state)
