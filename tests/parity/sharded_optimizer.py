"""Three updates of a small model, sharded over the processes and whole, with gradients that do not depend on their number.

    sharded_optimizer.py FOLDER OPTIMIZER...     run with torchrun's variables

For each optimizer: `FOLDER/NAME/sharded`, `whole` (a model without FSDP, as of one process) and `resumed` (whole, but its first two updates
come from a checkpoint of the sharded one).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from xtuner_core.checkpoint import state, store
from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizer import make_optimizer, set_learning_rate
from xtuner_core.parallel.mesh import World, join_world

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


class Model(torch.nn.Module):
    """Rows that two processes cannot share evenly, tall and wide matrices, a stack of experts, vectors, an embedding, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(33, 24)
        self.up = torch.nn.Linear(24, 67)
        self.down = torch.nn.Linear(67, 24, bias=False)
        self.wide = torch.nn.Linear(300, 17, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(3, 40, 24))
        self.norm = torch.nn.LayerNorm(24)
        self.frozen = torch.nn.Linear(24, 24).requires_grad_(False)
        self.head = torch.nn.Linear(24, 33, bias=False)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def new_model() -> Model:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Model()


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Of a step, by parameter name."""
    torch.manual_seed(step)
    return {name: torch.randn_like(parameter) for name, parameter in new_model().named_parameters() if parameter.requires_grad}


def start(name: str, world: World, sharded: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A new model and its optimizer."""
    model = new_model()
    if sharded:
        fully_shard(model, mesh=world.mesh)
    return model, make_optimizer(model, TrainConfig.model_validate({"optimizer": name, **SETTINGS}))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One update with the step's gradients."""
    given = gradients(step)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            given[name] = distribute_tensor(given[name], parameter.device_mesh, parameter.placements) if parameter.requires_grad else None
        parameter.grad = given.get(name)
    set_learning_rate(optimizer, SETTINGS["lr"] / step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, torch.Tensor]:
    """All of a checkpoint but the random streams."""
    return state.without_random_streams(state.collect(model, optimizer, world))  # pyright: ignore[reportArgumentType]


def main(folder: Path, names: list[str]) -> None:
    with join_world() as world:
        for name in names:
            sharded, whole, resumed = (start(name, world, sharded) for sharded in (True, False, False))
            for step in (1, 2):
                train(*sharded, step)
                train(*whole, step)
            store.save(folder / name / "step-2", tensors_of(*sharded, world), {}, world)
            tensors = tensors_of(*resumed, world)
            store.load(folder / name / "step-2", tensors)
            state.restore(*resumed, world, tensors)  # pyright: ignore[reportArgumentType]
            for word, run in {"sharded": sharded, "whole": whole, "resumed": resumed}.items():
                train(*run, 3)
                store.save(folder / name / word, tensors_of(*run, world), {}, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
