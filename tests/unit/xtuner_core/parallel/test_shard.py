"""A copy of the model on each process (on each two: test_distributed.py), weights that wait in CPU memory: as one process trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_core import trainer
from xtuner_core.build import build
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import SftConfig
from xtuner_core.errors import RecipeError
from xtuner_core.estimate import ONE_GROUP
from xtuner_core.models.layers import decoder_layers
from xtuner_core.parallel import shard
from xtuner_core.parallel.mesh import World, sharding_mesh
from xtuner_core.signals import StopRequest

IN_TURN = Path(__file__).parents[1] / "adapters" / "train_in_turn.py"
BASE = {"total_step": 4, "lr": 5e-3, "dtype": "fp32", "global_batch_size": 4, "checkpoint_interval": 2}
HYBRID = {**BASE, "fsdp": {"sharding_size": 1}}
WAITING = {**BASE, "fsdp": {"cpu_offload": True, "reshard_after_forward": False}, "recompute": "full", "activation_offload": True}
QUANTIZED = {**BASE, "fsdp": {"cpu_offload": True}, "recompute": "selective", "method": "qlora", "dtype": "bf16"}
Configure = Callable[..., SftConfig]


def test_groups_that_do_not_divide_the_processes_are_refused(world: World) -> None:
    with pytest.raises(RecipeError, match=r"train\.fsdp\.sharding_size \(2\): 3 processes cannot be divided into groups of that size"):
        sharding_mesh(replace(world, size=3), 2)


def test_layers_in_an_unknown_place_are_refused(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_folder))
    assert decoder_layers(model) == list(model.model.layers)
    model.config.num_hidden_layers = 3
    with pytest.raises(RecipeError, match="Qwen3ForCausalLM keeps its 3 decoder layers in an unknown place"):
        decoder_layers(model)


def losses(folder: Path) -> list[float]:
    return [json.loads(row)["total_loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(processes: int, configs: list[SftConfig]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(IN_TURN)]
    for config in configs:
        config.work_dir.mkdir(exist_ok=True)
        (config.work_dir / "config.json").write_text(config.model_dump_json())
        command.append(str(config.work_dir / "config.json"))
    environment = {**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze": ["model.layers.0.*"], "global_batch_size": 2},
        {"method": "lora", "lora": {"targets": ["layers.1.self_attn.q_proj"]}, "recompute": "full", "dtype": "bf16"},
    ],
    ids=["full", "lora"],
)
def test_one_process_takes_a_large_model_layer_by_layer(
    settings: dict[str, object], world: World, stop: StopRequest, sft_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a layer has nothing that trains: losses and weights are those of the model in one group."""
    found = []
    for name, limit in (("whole", ONE_GROUP), ("by layer", 0)):
        monkeypatch.setattr(shard, "ONE_GROUP", limit)
        config = sft_config(**settings).model_copy(update={"work_dir": tmp_path / name})
        config.work_dir.mkdir()
        model, _ = build(config, world)
        assert [isinstance(layer, FSDPModule) for layer in decoder_layers(model)] == [name == "by layer"] * 2
        trainer.train(config, world, stop)
        found.append((losses(config.work_dir), load_whole(config.work_dir / "final")))
    (whole, weights), (by_layer, same) = found
    assert by_layer == pytest.approx(whole, rel=1e-6)
    assert weights.keys() == same.keys()
    assert all(torch.allclose(same[name], weight, rtol=1e-4, atol=1e-6) for name, weight in weights.items())


@pytest.mark.slow
def test_hybrid_shards_and_cpu_offload_train_as_one_process_and_continue_each_other(
    world: World, stop: StopRequest, sft_config: Configure, tmp_path: Path
) -> None:
    def run(name: str, settings: dict[str, object], checkpoint: Path | None = None) -> SftConfig:
        config = sft_config(**settings).model_copy(update={"work_dir": tmp_path / name})
        if checkpoint:
            shutil.copytree(checkpoint, config.work_dir / "checkpoints" / checkpoint.name)
        return config

    alone, hybrid, quantized_alone = (
        run("alone", BASE),
        run("hybrid", HYBRID),
        run("quantized alone", {**BASE, "method": "qlora", "dtype": "bf16"}),
    )
    for config in (alone, quantized_alone):
        config.work_dir.mkdir()
        trainer.train(config, world, stop)
    begun = alone.work_dir / "checkpoints" / "step-2"
    waiting, by_two, quantized = run("waiting", WAITING), run("by two", WAITING, begun), run("quantized", QUANTIZED)
    launch(2, [hybrid, waiting, by_two, quantized])
    by_one = run("by one", WAITING, hybrid.work_dir / "checkpoints" / "step-2")
    trainer.train(by_one, world, stop)
    expected = losses(alone.work_dir)
    for config, steps in ((hybrid, 4), (waiting, 4), (by_two, 2), (by_one, 2)):
        assert losses(config.work_dir) == pytest.approx(expected[-steps:], rel=1e-5), config.work_dir.name
    assert losses(quantized.work_dir) == pytest.approx(losses(quantized_alone.work_dir), rel=2e-3)
    weights, of_both = (load_whole(config.work_dir / "final") for config in (alone, hybrid))
    assert weights.keys() == of_both.keys()
    assert all((of_both[name] - tensor).norm() <= 1e-3 * tensor.norm() for name, tensor in weights.items())
    assert all(torch.isfinite(tensor).all() for tensor in of_both.values())
