"""Every method on one process and on two, and resumed: the same training; and the whole model that convert makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipelines import convert
from pipelines.recipe import load_recipe
from pipelines.stage import Metrics, Work
from xtuner_core import trainer
from xtuner_core.adapters.qlora import as_quantized
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import SftConfig
from xtuner_core.export.checkpoint import open_model
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

pytestmark = pytest.mark.slow

METHODS = {
    "freeze": {"freeze": ["model.embed_tokens.*", "model.layers.0.*"], "dtype": "bf16"},
    "dora": {"method": "lora", "lora": {"rslora": True, "dora": True, "targets": ["q_proj", "layers.1.mlp.up_proj"]}, "dtype": "fp32"},
    "qlora": {"method": "qlora", "dtype": "bf16"},
}


def new_run(name: str, folder: Path, model: Path, data: Path) -> SftConfig:
    fields = {"total_step": 4, "lr": 5e-3, "global_batch_size": 2, "checkpoint_interval": 2, **METHODS[name]}
    config = SftConfig.model_validate({"model_dir": model, "data_dir": data, "work_dir": folder, "train": fields})
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    return config


def going_on(first: SftConfig, folder: Path) -> SftConfig:
    """One step that changes nothing, from the result of a run."""
    still = {"start": str(first.work_dir / "final"), "total_step": 1, "lr": 1e-30, "lr_min": 0.0, "weight_decay": 0.0}
    train = first.train.model_copy(update=still)
    config = first.model_copy(update={"work_dir": folder, "train": train})
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    return config


@pytest.fixture(scope="module")
def on_two(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method → the work directory of its run on two processes, and of one that goes on from its result."""
    work = tmp_path_factory.mktemp("two")
    runs = {name: new_run(name, work / name, tiny_model_folder, tiny_data) for name in METHODS}
    folders = {name: config.work_dir for name, config in runs.items()}
    folders |= {f"{name} again": going_on(config, work / f"{name} again").work_dir for name, config in runs.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [Path(__file__).with_name("train_in_turn.py"), *(folder / "config.json" for folder in folders.values())]
    environment = {**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def losses(folder: Path) -> list[float]:
    return [json.loads(row)["total_loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(config: SftConfig, source: Path, folder: Path, world: World, stop: StopRequest) -> dict[str, torch.Tensor]:
    """The final tensors of a run that goes on from the only checkpoint of `source`, after half of the steps."""
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    trainer.train(config.model_copy(update={"work_dir": folder}), world, stop)
    assert len(losses(folder)) == 2
    return load_whole(folder / "final")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 0.02 * tensor.norm(), name


def converted(config: SftConfig, model: Path, data: Path, folder: Path) -> Metrics:
    """The convert stage on a run's final folder, exported as fp32 into `folder/payload`."""
    recipe = load_recipe("qwen3_tiny_full_openai", ["convert.dtype=float32"]).model_copy(update={"train": config.train})
    parts = {part: folder / part for part in ("payload", "record", "scratch", "cache")}
    for part in parts.values():
        part.mkdir()
    shutil.copytree(config.work_dir / "final", folder / "trained" / "checkpoint")
    inputs = {"base": model.parent, "data": data, "checkpoint": folder / "trained"}
    return convert.run(recipe, Work(inputs, **parts, log=print))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("name", METHODS)
def test_a_result_of_two_processes_is_what_two_begin_with_and_one(
    name: str, on_two: dict[str, Path], world: World, stop: StopRequest, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first = new_run(name, tmp_path / name, tiny_model_folder, tiny_data).model_copy(update={"work_dir": on_two[name]})
    alone = going_on(first, tmp_path / "alone")
    trainer.train(alone, world, stop)
    saved, two, one = (load_whole(folder / "final") for folder in (on_two[name], on_two[f"{name} again"], alone.work_dir))
    for other in (two, one):
        assert other.keys() == saved.keys() and all((other[tensor] - saved[tensor]).abs().max() < 1e-25 for tensor in saved)


def test_the_adapter_begun_with_is_the_merged_model(
    world: World, stop: StopRequest, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = new_run("dora", tmp_path / "one", tiny_model_folder, tiny_data)
    trainer.train(config, world, stop)
    converted(config, tiny_model_folder, tiny_data, tmp_path)
    adapter = going_on(config, tmp_path / "adapter")
    full = adapter.train.model_copy(update={"method": "full", "start": None})
    (tmp_path / "merged").mkdir()
    merged = adapter.model_copy(update={"model_dir": tmp_path / "payload" / "model", "work_dir": tmp_path / "merged", "train": full})
    for run in (adapter, merged):
        trainer.train(run, world, stop)
    [goes_on], [whole], first = (losses(folder) for folder in (adapter.work_dir, merged.work_dir, config.work_dir))
    assert goes_on == pytest.approx(whole, rel=1e-5) and goes_on < 0.98 * first[0]


@pytest.mark.parametrize("name", METHODS)
def test_one_process_two_and_a_resumed_run_train_the_same_and_convert_makes_it_whole(
    name: str, on_two: dict[str, Path], world: World, stop: StopRequest, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = new_run(name, tmp_path / "one", tiny_model_folder, tiny_data)
    trainer.train(config, world, stop)
    one, two = (load_whole(folder / "final") for folder in (config.work_dir, on_two[name]))
    assert losses(config.work_dir)[-1] < 0.98 * losses(config.work_dir)[0]
    assert losses(on_two[name]) == pytest.approx(losses(config.work_dir), rel=1e-4)
    assert_close(one, two)
    again = resumed(config, config.work_dir, tmp_path / "again", world, stop)
    assert again.keys() == one.keys() and all(torch.equal(again[tensor], one[tensor]) for tensor in one)
    assert_close(one, resumed(config, on_two[name], tmp_path / "from two", world, stop))
    metrics = converted(config, tiny_model_folder, tiny_data, tmp_path)
    whole, base = load(tmp_path / "payload" / "model"), load(tiny_model_folder)
    if config.train.method == "full":
        kept = {name for name, tensor in base.state_dict().items() if torch.equal(tensor, whole.state_dict()[name])}
        assert {name for name in base.state_dict() if name not in one} <= kept and "model.layers.1.mlp.up_proj.weight" not in kept
    else:
        assert metrics["merge_error"] <= convert.MERGE_TOLERANCE
        if config.train.method == "qlora":  # it was trained beside what the 4 bits stand for, and that is what it is merged into
            seen = as_quantized(open_model(tiny_model_folder), base, torch.bfloat16)
            base.load_state_dict({name: tensor.read() for name, tensor in seen.items()}, strict=False)
        before, expected = logits(base), logits(PeftModel.from_pretrained(base, str(tmp_path / "payload" / "adapter")).eval())
        assert (expected - before).abs().max() > 0.01 * before.abs().max()
        assert (logits(whole) - expected).abs().max() <= 1e-5 * expected.abs().max()
