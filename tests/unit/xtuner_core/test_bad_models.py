"""Model folders that cannot be trained on: told in one message, through the engine's own command and the pipeline alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import base_model
from pipelines.artifacts import Store
from pipelines.recipe import PROJECT, load_recipe
from xtuner_core import sft
from xtuner_core.checkpoint.hf import INDEX, SINGLE
from xtuner_core.errors import UserError

HELDOUT = PROJECT / "data" / "openai_chats" / "heldout.jsonl"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def in_two_files(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def lose_a_file(folder: Path) -> None:
    in_two_files(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def promise_too_much(folder: Path) -> None:
    in_two_files(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def as_hub_cache(folder: Path) -> None:
    files = list(folder.iterdir())
    for name in ("old", "new"):
        (folder / "snapshots" / name).mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, folder / "snapshots" / name / file.name)
    for file in files:
        file.unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("new")


def as_whole_cache(folder: Path) -> None:
    as_hub_cache(folder)
    inner = folder / "models--me--tiny"
    inner.mkdir()
    for part in ("snapshots", "refs"):
        (folder / part).rename(inner / part)
    shutil.rmtree(inner / "snapshots" / "old")


def as_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def as_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def a_folder_too_high(folder: Path) -> None:
    (folder / "payload").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(folder / "payload" / file.name)


def truncate(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1000)


def add_token(folder: Path, number: int) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def spoil(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return lambda folder: rewrite(folder, change)


BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "cache of one repository": (as_hub_cache, 78, "is the root of a hub cache; name the snapshot in it: {folder}/snapshots/new."),
    "cache of all": (as_whole_cache, 78, "name the snapshot in it: {folder}/models--me--tiny/snapshots/new."),
    "a file of several is missing": (lose_a_file, 78, "is not a complete model folder: model-00002-of-00002.safetensors missing."),
    "an index that is not its files'": (promise_too_much, 65, "the tensor model.layers.9.mlp.up_proj.weight is not in it"),
    "torn weights": (truncate, 65, "model.safetensors: not a whole safetensors file"),
    "only pickles": (as_pickles, 78, "model.safetensors missing. Its weights are pickle files (pytorch_model.bin), which may run"),
    "an adapter alone": (as_adapter, 78, "config.json missing. It is an adapter without its model"),
    "a folder too high": (a_folder_too_high, 78, "There is a config.json in its folder payload."),
    "not a number": (spoil(UP, torch.nan), 65, f"NaN or infinity in {UP}."),
    "infinity": (spoil(NORM, -torch.inf), 65, f"NaN or infinity in {NORM}."),
    "a tensor is missing": (lambda folder: rewrite(folder, lambda held: held.pop(UP)), 65, f"{UP} is missing"),
    "a tensor too many": (
        lambda folder: rewrite(folder, lambda held: held.update(extra=torch.zeros(3))),
        65,
        "extra [3] has no place",
    ),
    "another width": (lambda folder: set_config(folder, intermediate_size=96), 65, f"{UP} is ["),
    "another shape": (
        lambda folder: rewrite(folder, lambda held: held.update({NORM: torch.zeros(7)})),
        65,
        f"{NORM} is [7] and should be [64]",
    ),
    "more layers": (
        lambda folder: set_config(folder, num_hidden_layers=3, layer_types=None),
        65,
        "model.layers.2.input_layernorm.weight is missing",
    ),
    "fewer rows than ids": (
        lambda folder: (
            set_config(folder, vocab_size=100),
            rewrite(folder, lambda held: held.update({"model.embed_tokens.weight": held["model.embed_tokens.weight"][:100].clone()})),
        ),
        78,
        "has 261 ids (up to 260), the model's vocab_size is 100",
    ),
    "a token far out": (lambda folder: add_token(folder, 5000), 78, "has 5001 ids (up to 5000), the model's vocab_size is 264"),
    "an unknown architecture": (lambda folder: set_config(folder, model_type="nobody"), 78, "transformers cannot load this model"),
}  # fmt: skip


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def flags(folder: Path, work: Path) -> list[str]:
    return ["--load-from", str(folder), "--dataset", str(HELDOUT), "--work-dir", str(work), "--total-step", "1"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_told_by_both_ways_and_nothing_is_made(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, code, told = BAD[name]
    damage(folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}

    assert sft.main(flags(folder, tmp_path / "work")) == code
    message = capfd.readouterr().err
    assert told.format(folder=folder) in message and str(folder) in message
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message
    assert not (tmp_path / "work" / "metrics.jsonl").exists() and not (tmp_path / "work" / "prepared").exists()

    store = Store(tmp_path / "store")
    with pytest.raises(UserError) as caught:
        store.produce(base_model.STAGE, load_recipe("qwen3_tiny_full_openai", [f"model.base={folder}"]), {}, print)
    assert caught.value.exit_code == code and told.format(folder=folder).split(str(folder))[0] in str(caught.value)
    assert not list(store.folders())
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "harmless",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ],
)
def test_what_older_versions_saved_beside_is_no_error(harmless: dict[str, torch.Tensor | str], folder: Path, tmp_path: Path) -> None:
    def add(held: dict[str, torch.Tensor]) -> None:
        held.update({name: held[value].clone() if isinstance(value, str) else value for name, value in harmless.items()})

    rewrite(folder, add)
    assert sft.main(flags(folder, tmp_path / "work")) == 0


@pytest.mark.parametrize(("command", "name"), [("engine", "a tensor is missing"), ("pipeline", "cache of one repository")])
def test_the_commands_end_with_the_code_and_the_message_alone(command: str, name: str, folder: Path, tmp_path: Path) -> None:
    damage, code, told = BAD[name]
    damage(folder)
    recipe = ["qwen3_tiny_full_openai", "--set", f"model.base={folder}", "--store", str(tmp_path / "store")]
    words = {"engine": ["xtuner_core.sft", *flags(folder, tmp_path / "work")], "pipeline": ["pipelines.cli", "train", *recipe]}[command]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and told.format(folder=folder) in done.stderr and "Traceback" not in done.stderr
