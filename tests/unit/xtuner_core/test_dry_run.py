"""The dry run changes nothing but finds what the largest packs need; memory that runs out is told with what takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.recipe import PROJECT
from xtuner_core.build import build
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import make_batch
from xtuner_core.dry_run import largest, out_of_memory_told, rehearse
from xtuner_core.errors import RecipeError
from xtuner_core.parallel.mesh import World, device_of
from xtuner_core.signals import StopRequest
from xtuner_core.trainer import train

Configure = Callable[..., SftConfig]


def test_the_longest_row_and_the_most_learned_tokens_are_found(tiny_data: Path) -> None:
    dataset = PackedDataset(tiny_data)
    every = [make_batch(dataset, index) for index in range(len(dataset))]
    found = largest(dataset)
    assert 1 <= len(found) <= 2
    assert found[0].input_ids.shape[1] == max(batch.input_ids.shape[1] for batch in every)
    assert max(batch.learned for batch in found) == max(batch.learned for batch in every)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_the_same_with_and_without(method: str, world: World, stop: StopRequest, sft_config: Configure, tmp_path: Path) -> None:
    results = []
    for dry_run in ("off", "on"):
        config = sft_config(method=method, dry_run=dry_run, global_batch_size=2, lora={"dropout": 0.3})
        config = config.model_copy(update={"work_dir": tmp_path / dry_run})
        config.work_dir.mkdir()
        train(config, world, stop)
        rows = [json.loads(line) for line in (config.work_dir / "metrics.jsonl").read_text().splitlines()]
        weights = {file.name: file.read_bytes() for file in (config.work_dir / "final").rglob("*.safetensors")}
        results.append(([(row["total_loss"], row["grad_norm"]) for row in rows], weights))
    assert results[0] == results[1] and results[0][1]


def test_nothing_is_left_behind_and_it_is_told(world: World, sft_config: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    config = sft_config(dry_run="on")
    model, optimizer = build(config, world)
    before, state = [parameter.full_tensor().clone() for parameter in model.parameters()], torch.get_rng_state()  # pyright: ignore
    rehearse(model, optimizer, PackedDataset(config.data_dir), config, world)
    assert "dry run of the largest packs: " in capfd.readouterr().out
    assert torch.equal(torch.get_rng_state(), state) and not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter.full_tensor(), was) for parameter, was in zip(model.parameters(), before, strict=True))  # pyright: ignore


@pytest.mark.parametrize("dry_run", ["off", "auto"])
def test_on_a_cpu_it_has_to_be_asked_for(dry_run: str, world: World, sft_config: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    config = sft_config(dry_run=dry_run)
    model, optimizer = build(config, world)
    rehearse(model, optimizer, PackedDataset(config.data_dir), config, world)
    assert "dry run" not in capfd.readouterr().out


def test_an_allocation_that_fails_is_told_with_the_estimate(world: World, sft_config: Configure) -> None:
    told = r"out of memory on rank 0: .*GiB of memory a process \(.*Try train\.optimizer=adamw_8bit; "
    with pytest.raises(RecipeError, match=told), out_of_memory_told(sft_config(), world):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RecipeError, match=r"out of memory on rank 0: no memory is left\. "), out_of_memory_told(sft_config(), world):
        bytearray(2**62)


def test_other_errors_stay_what_they_are(world: World, sft_config: Configure) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), out_of_memory_told(sft_config(), world):
        torch.ones(2).add(torch.ones(3))


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and the world of this module's tests."""
LIMITED = """
import resource, sys
from xtuner_core import dry_run, sft
from xtuner_core import trainer
started = dry_run.rehearse
def rehearse(*arguments):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    started(*arguments)
trainer.rehearse = rehearse
sys.exit(sft.main(sys.argv[1:]))
"""
"""The process gets a limit once the model is there: 200 MiB more than it takes by then."""


def test_memory_that_does_not_suffice_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 65536, "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    chats, work = PROJECT / "data" / "openai_chats" / "heldout.jsonl", tmp_path / "work"
    words = ["--model-cfg", str(tmp_path / "config.json"), "--dataset", str(chats), "--work-dir", str(work), "--total-step", "1"]
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment = {**alone, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, *words, "--dry-run", "on"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 78, done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("error: out of memory on rank 0: ") and "By estimate this run takes about " in told and "Traceback" not in told
    assert json.loads((work / "outcome.json").read_text())["code"] == 78
    assert not (work / "metrics.jsonl").exists() and not (work / "final").exists()


def test_a_process_has_a_gpu_of_its_own() -> None:
    assert device_of(3, 0) == torch.device("cpu")
    assert device_of(1, 2) == torch.device("cuda", 1)
    with pytest.raises(RecipeError, match=r"process 3 on this machine has no GPU: there are 2, .*--nproc-per-node to 2 or less"):
        device_of(2, 2)
