"""Runs of the engine alone, given to others by `xtuner convert`: adapter, merged folder, full model; and the merge command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.cli import main
from pipelines.recipe import PROJECT
from xtuner_core import sft
from xtuner_core.errors import DataError, RecipeError

pytestmark = pytest.mark.slow
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Work directories of three steps each; `full` begins with random weights and has a chat template of the run's choice."""
    place = tmp_path_factory.mktemp("runs")
    every = ["--dataset", str(PROJECT / "data" / "openai_chats" / "train.jsonl"), "--pack-max-length", "1024", "--dtype", "fp32"]
    every += ["--lr", "1e-2", "--total-step", "3", "--checkpoint-interval", "1"]
    for name, words in {
        "full": ["--model-cfg", "qwen3-tiny", "--seed", "7"],
        "lora": ["--load-from", str(tiny_model_folder), "--method", "lora", "--lora.dora", "on"],
        "qlora": ["--load-from", str(tiny_model_folder), "--method", "qlora"],
    }.items():
        assert sft.main([*every, *words, "--work-dir", str(place / name)]) == 0
    return place


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def convert(*words: str | Path) -> int:
    return main(["convert", *map(str, words)])


def require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_lora_run_becomes_an_adapter_and_a_model(runs: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    assert convert("to_hf", runs / "lora", tmp_path / "adapter") == 0
    assert convert("adapter", runs / "lora" / "final", tmp_path / "same") == 0
    for file in (tmp_path / "adapter").iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    adapted = logits(AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32).eval())
    assert (adapted - logits(load(tiny_model_folder))).abs().max() > 0.01
    assert convert("to_hf", runs / "lora", tmp_path / "model", "--merge", "--dtype", "float32") == 0
    require_close(logits(load(tmp_path / "model")), adapted)
    assert convert("merge", tiny_model_folder, tmp_path / "adapter", tmp_path / "merged", "--dtype", "float32") == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_checkpoint_on_the_way_is_another_adapter(runs: Path, tmp_path: Path) -> None:
    assert convert("adapter", runs / "lora" / "checkpoints" / "step-1", tmp_path / "early") == 0
    assert convert("adapter", runs / "lora", tmp_path / "late") == 0
    early, late = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("early", "late"))
    assert len(early) == len(late) and early != late
    assert (tmp_path / "early" / "adapter_config.json").read_bytes() == (tmp_path / "late" / "adapter_config.json").read_bytes()


def test_a_qlora_run_is_merged_into_what_it_was_trained_beside(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert("to_hf", runs / "qlora", tmp_path / "model", "--merge") == 0
    assert "are quantized to 4 bits (NF4) and de-quantized again first" in capfd.readouterr().out
    assert convert("adapter", runs / "qlora", tmp_path / "adapter") == 0
    assert json.loads((tmp_path / "adapter" / "quantized_base.json").read_text())["dtype"] == "float32"


def test_a_full_run_becomes_a_model_with_its_template(runs: Path, tmp_path: Path) -> None:
    assert convert("to_hf", runs / "full", tmp_path / "model", "--dtype", "bfloat16", "--max-shard-size", "100KB") == 0
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert convert("to_hf", runs / "full" / "checkpoints" / "step-1", tmp_path / "early") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert not torch.equal(model.model.norm.weight, load(tmp_path / "early").model.norm.weight.bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["adapter", "{runs}/full", "{out}/x"], RecipeError.exit_code, "trained the model itself and no adapter"),
        (["to_hf", "{runs}", "{out}/x"], RecipeError.exit_code, "no work directory of a run with a result or a checkpoint"),
        (["to_hf", "{runs}/lora", "{out}/x", "--base", "{runs}/full/prepared"], RecipeError.exit_code, "give --base"),
        (["to_hf", "{runs}/lora", "{out}"], RecipeError.exit_code, "exists already"),
        (["merge", "{base}", "{out}/x"], RecipeError.exit_code, "one adapter or more, and the folder to be made"),
        (["merge", "{base}", "a", "b", "{out}/x", "--weight", "1"], RecipeError.exit_code, "1 --weight for 2 adapters"),
        (["merge", "{base}", "{runs}", "{out}/x"], RecipeError.exit_code, "adapter_config.json is missing"),
    ],
)
def test_a_mistake_is_one_message(
    words: list[str], code: int, told: str, runs: Path, tmp_path: Path, tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"runs": runs, "out": tmp_path, "base": tiny_model_folder}
    assert convert(*(word.format(**places) for word in words)) == code
    assert told in (error := capfd.readouterr().err) and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (other,) = (runs / "full" / "prepared").glob("model-*")
    assert convert("to_hf", runs / "lora", tmp_path / "x", "--base", other) == DataError.exit_code
    assert "was trained on another model than" in capfd.readouterr().err


def test_two_adapters_are_weighed_by_the_command_itself(runs: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    """As a user runs it, in a process of its own."""
    from xtuner_core.adapters.lora import save_adapter
    from xtuner_core.export.run import open_trained

    trained = open_trained(runs / "qlora")
    for name in ("one", "other"):  # LoRA beside a base in full precision, so that peft alone can tell what is right
        save_adapter(trained.tensors, trained.train, "model", tmp_path / name)
    words = ["merge", tiny_model_folder, tmp_path / "one", tmp_path / "other", tmp_path / "sum", "--weight", "0.25", "--weight", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "convert", *map(str, words), "--dtype", "float32"],
        cwd=PROJECT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(tmp_path / "sum"))
    theirs = PeftModel.from_pretrained(load(tiny_model_folder), str(tmp_path / "one"))
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 0.75
    require_close(logits(load(tmp_path / "sum")), logits(theirs.eval()))
