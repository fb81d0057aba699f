"""Names, shapes, types and bytes of what is exported, against transformers' own `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import ARCHITECTURES, build
from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.errors import DataError
from xtuner_core.export.checkpoint import open_model, to_hugging_face
from xtuner_core.export.tensors import Lazy, open_folder, write_folder

WEIGHTS = "model.safetensors"


def published(name: str, folder: Path) -> PreTrainedModel:
    """A model that was loaded from a published folder and saved to `folder`, as bf16."""
    build(ARCHITECTURES[name], "eager").bfloat16().save_pretrained(folder / "first")
    model = AutoModelForCausalLM.from_pretrained(folder / "first", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.rmtree(folder / "first")
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_bit_identical(name: str, tmp_path: Path) -> None:
    """Published → the model's names → published, and the model's own tensors → published, where only its config is known."""
    model = published(name, tmp_path / "published")
    config, there, back, own = (tmp_path / word for word in ("config", "there", "back", "own"))
    for folder in (config, there, back, own):
        folder.mkdir()
    shutil.copy(tmp_path / "published" / "config.json", config)

    opened, state = open_model(tmp_path / "published"), model.state_dict()
    assert opened.keys() == state.keys() - set(model.all_tied_weights_keys)
    for key, tensor in opened.items():
        assert torch.equal(tensor.read(), state[key]) and (tensor.shape, tensor.dtype) == (tuple(state[key].shape), state[key].dtype), key

    expected = (tmp_path / "published" / WEIGHTS).read_bytes()
    write_folder(to_hugging_face(tmp_path / "published", opened), back)
    assert (back / WEIGHTS).read_bytes() == expected
    write_folder(to_hugging_face(config, {key: Lazy.of(tensor) for key, tensor in state.items()}), own)
    assert (own / WEIGHTS).read_bytes() == expected


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A published Qwen3-MoE."""
    published("qwen3_moe", tmp_path)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    changed = load_file(folder / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / WEIGHTS, {"format": "pt"})


def test_names_without_the_model_s_prefix_and_tensors_without_a_place_in_it(mixture: Path) -> None:
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(mixture / WEIGHTS).items()}
    save_file(stored, mixture / WEIGHTS, {"format": "pt"})
    change(mixture, layers__9__mlp__experts__0__gate_proj__weight=torch.ones(2))
    opened = open_model(mixture)
    assert "model.layers.1.mlp.experts.gate_up_proj" in opened and "layers.9.mlp.experts.0.gate_proj.weight" in opened
    wanted = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(opened[name].read(), tensor) for name, tensor in wanted.items())
    assert "layers.9.mlp.experts.0.gate_proj.weight" in to_hugging_face(mixture, opened)


def test_a_fused_tensor_is_read_once_for_all_its_experts(mixture: Path) -> None:
    opened = open_model(mixture)
    reads: list[str] = []

    def counted(name: str, tensor: Lazy) -> Lazy:
        def read() -> torch.Tensor:
            reads.append(name)
            return tensor.read()

        return Lazy(tensor.shape, tensor.dtype, read)

    for tensor in to_hugging_face(mixture, {name: counted(name, tensor) for name, tensor in opened.items()}).values():
        tensor.read()
    assert sorted(reads) == sorted(opened)


def test_a_tensor_that_only_changes_its_name_is_copied_as_it_lies(mixture: Path) -> None:
    exported = to_hugging_face(mixture, open_model(mixture))
    stored = open_folder(mixture)
    assert exported.keys() == stored.keys()
    assert all(exported[name].extents == stored[name].extents for name in stored if ".experts." not in name)


def test_tied_tensors_that_differ_are_both_kept(tmp_path: Path) -> None:
    """As transformers does: it then ties them not, whatever the config says; and the second name alone stands for both."""
    published("llama3", tmp_path)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    change(tmp_path, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in open_model(tmp_path)
    change(tmp_path, lm_head__weight=embedding + 1)
    assert "lm_head.weight" in to_hugging_face(tmp_path, open_model(tmp_path))
    change(tmp_path, model__embed_tokens__weight=None)
    opened = open_model(tmp_path)
    assert "lm_head.weight" not in opened and torch.equal(opened["model.embed_tokens.weight"].read(), embedding + 1)


def test_missing_experts_are_told(mixture: Path) -> None:
    for name in ("model__layers__1__mlp__experts__2__down_proj__weight", "model__layers__1__mlp__experts__2__up_proj__weight"):
        change(mixture, **{name: None})
        with pytest.raises(DataError, match=r"model.layers.1.mlp.experts.*"):
            open_model(mixture)


def test_a_config_of_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(DataError, match=r"config.json: describes no model"):
        to_hugging_face(tmp_path, {})
