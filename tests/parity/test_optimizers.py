"""Muon against torch's and against its definition; every optimizer on two processes against one, and after a resume on another number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from pipelines.recipe import PROJECT
from xtuner_core import registry
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import TrainConfig
from xtuner_core.export.checkpoint import open_checkpoint
from xtuner_core.optim import optimizers
from xtuner_core.optim.optimizer import make_optimizer
from xtuner_core.optim.optimizers import muon

SHAPES = [(33, 65), (65, 33), (64, 64), (1, 7), (576, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_torch_s_to_the_last_bit(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    model = torch.nn.Module()
    model.register_parameter("weight", ours)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0.1))
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def by_definition(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    """Muon in double precision through the singular values: the polynomial acts on each of them, and turns no vector."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        u, sizes, v = torch.linalg.svd(0.95 * momentum + 0.05 * gradient, full_matrices=False)
        sizes = sizes / sizes.norm()
        for _ in range(5):
            sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
        weight = (1 - rate * decay) * weight - rate * 0.2 * max(weight.shape) ** 0.5 * (u @ sizes.diag() @ v)
    return weight


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
def test_muon_does_what_its_definition_says(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(3, *shape), [torch.randn(3, *shape) for _ in range(3)]
    found, state = weight.clone(), {}
    for gradient in gradients:
        muon.update(found, gradient, state, 1e-2, 0.1)
    for number in range(3):  # a stack of experts is updated one by one
        expected = by_definition(weight[number].double(), [gradient[number].double() for gradient in gradients], 1e-2, 0.1)
        change = (expected - weight[number]).norm()
        assert (found[number] - expected).norm() < 0.02 * change  # the iteration runs in bf16
        alone, its_state = weight[number].clone(), {}
        for gradient in gradients:
            muon.update(alone, gradient[number], its_state, 1e-2, 0.1)
        assert torch.equal(alone, found[number])


def test_muon_leaves_embeddings_head_and_vectors_to_adamw() -> None:
    model = two_processes.new_model()
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    assert groups == [
        {"up.weight", "down.weight", "wide.weight", "experts"},
        {"embedding.weight", "head.weight"},
        {"up.bias", "norm.weight", "norm.bias"},
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {frozenset(optimizer.state[parameter]) for parameter in groups_of(optimizer)[0]} == {frozenset({"momentum_buffer"})}
    assert {frozenset(optimizer.state[parameter]) for parameter in groups_of(optimizer)[1]} == {
        frozenset({"step", "exp_avg", "exp_avg_sq"})
    }


def groups_of(optimizer: torch.optim.Optimizer) -> list[list[torch.nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


NAMES = registry.names(optimizers)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two_processes.py leaves."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, two_processes.__file__, str(folder), *NAMES]
    environments = [{**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for environment in environments
    ]
    try:
        for rank, process in enumerate(started):
            told = process.communicate(timeout=120)[0]
            assert process.returncode == 0, told[-3000:]
            (folder / f"{rank}.log").write_text(told, encoding="utf-8")
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.mark.parametrize("name", [*NAMES, *(name + two_processes.BF16 for name in NAMES)])
def test_two_processes_update_as_one_and_one_resumes_from_two(name: str, outcome: Path) -> None:
    whole = load_whole(outcome / name / "whole")
    assert {"model.up.weight", "model.norm.bias"} <= whole.keys() and not [key for key in whole if "frozen" in key]
    start = two_processes.new_model().state_dict()
    assert all((tensor - start[key.removeprefix("model.")]).abs().max() > 1e-3 for key, tensor in whole.items() if key.startswith("model."))
    for other in ("sharded", "resumed"):
        found = load_whole(outcome / name / other)
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():  # fused AdamW rounds the last few numbers of a vector in another way than the ones before
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7, msg=lambda told, key=key: f"{key}: {told}")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_of_two_processes_are_read_as_torch_reads_them(outcome: Path) -> None:
    for folder in sorted(outcome.glob("*/*")):
        opened = open_checkpoint(folder)
        loaded = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in opened.items()}
        reader = HuggingFaceStorageReader(str(folder / "tensors"))
        load(loaded, storage_reader=reader, no_dist=True)
        assert opened.keys() == reader.read_metadata().state_dict_metadata.keys()
        assert [name for name, tensor in opened.items() if not torch.equal(tensor.read(), loaded[name])] == []


def test_muon_gives_the_same_bits_on_two_processes(outcome: Path) -> None:
    whole, sharded = (load_whole(outcome / "muon" / word) for word in ("whole", "sharded"))
    keys = [f"model.{name}" for name in ("up.weight", "down.weight", "wide.weight", "experts")]
    keys += [key for key in whole if key.endswith("momentum_buffer")]
    assert len(keys) == 8
    assert [key for key in keys if not torch.equal(whole[key], sharded[key])] == []


def test_a_spike_that_one_process_sees_is_left_out_by_both_and_all_documents_are_named(outcome: Path) -> None:
    for rank in (0, 1):
        assert json.loads((outcome / f"judged-{rank}.json").read_text()) == {"norms": [1.0, 1.0], "in_a_row": 1, "skipped": 1}
    assert "left out step 7" in (outcome / "0.log").read_text() and "Documents of the step: [0, 10, 11]." in (outcome / "0.log").read_text()
