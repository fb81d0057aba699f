"""Three updates of a small model, sharded over the processes and whole, with gradients that do not depend on their number.

    two_processes.py FOLDER OPTIMIZER...     run with torchrun's variables

For each optimizer, with weights in fp32 and in bf16 (`NAME-bf16`): `FOLDER/NAME/sharded`, `whole` (a model without FSDP, as of one
process) and `resumed` (whole, but its first two updates come from a checkpoint of the sharded one). `FOLDER/judged-RANK.json`: what each
process decides about a step that is an outlier to one.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from xtuner_core.checkpoint import state, store
from xtuner_core.config import TrainConfig
from xtuner_core.durable import write_json
from xtuner_core.guards import History, judge
from xtuner_core.optim.optimizer import make_optimizer, set_learning_rate
from xtuner_core.parallel.mesh import World, join_world, leave

BF16 = "-bf16"
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
    optimizer, bf16, _ = name.partition(BF16)
    model = new_model().bfloat16() if bf16 else new_model()
    if sharded:
        fully_shard(model, mesh=world.mesh)
    weights = {"weights": "bf16" if bf16 else "fp32"}
    return model, make_optimizer(model, TrainConfig.model_validate({"optimizer": optimizer, **weights, **SETTINGS}))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One update with the step's gradients."""
    given = {name: gradient.to(next(model.parameters()).dtype) for name, gradient in gradients(step).items()}
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
        for name in [*names, *(name + BF16 for name in names)]:
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
        write_json(folder / f"judged-{world.rank}.json", asdict(judge_differently(world)))


def judge_differently(world: World) -> History:
    """Only the last process has a norm that is too high; each has as many documents as its rank, and one more."""
    rule = TrainConfig(skip_grad_norm_factor=2.0, skip_grad_norm_window=2)
    documents = [10 * world.rank + number for number in range(world.rank + 1)]
    return judge(History((1.0, 1.0)), 7, 0.5, 9.0 if world.rank == world.size - 1 else 1.0, documents, rule, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
