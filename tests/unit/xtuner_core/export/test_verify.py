"""What is noted while a model is written, and the comparison with what is read back; how logits are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_core.errors import DataError
from xtuner_core.export import verify
from xtuner_core.export.checkpoint import open_model, to_hugging_face
from xtuner_core.export.tensors import Lazy, open_folder, write_folder
from xtuner_core.export.verify import agreement, largest_difference, noted, require_noted


@pytest.fixture
def model() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "c": torch.tensor(3),
    }


def written(model: dict[str, torch.Tensor], folder: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    write_folder(noted({name: Lazy.of(tensor) for name, tensor in model.items()}, digests), folder)
    return digests


def test_what_is_read_back_is_what_was_written(model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digests = written(model, tmp_path)
    assert sorted(digests) == sorted(model)
    require_noted(open_folder(tmp_path), digests)


@pytest.mark.parametrize("place", [0, 17, 58])
def test_another_bit_is_found(place: int, model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digests = written(model, tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1 - place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"tensor (a|b|c) read back from the exported folder is not what was written"):
        require_noted(open_folder(tmp_path), digests)


def test_another_tensor_shape_or_type_is_found(model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digests = written(model, tmp_path)
    for name, other in {"d": torch.ones(1), "a": model["a"].view(4, 3), "b": model["b"].view(torch.float16)}.items():
        with pytest.raises(DataError, match=f"tensor {name} read back"):
            require_noted({**open_folder(tmp_path), name: Lazy.of(other)}, digests)


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_renamed_split_and_tied_comes_back(tied: bool, tmp_path: Path) -> None:
    """Experts are one tensor in the model and many in the folder; two of them swapped are found, although every shape is right."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 64, "num_experts": 4}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", **sizes, **counts, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    digests: dict[str, str] = {}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in open_model(tmp_path).items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in rounded
    config.save_pretrained(tmp_path / "out")
    write_folder(to_hugging_face(tmp_path, noted(rounded, digests)), tmp_path / "out", "10KB")
    require_noted(open_model(tmp_path / "out"), digests)

    up = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in (0, 3)]
    exported = {name: Lazy.of(tensor.read().clone()) for name, tensor in open_folder(tmp_path / "out").items()}
    exported[up[0]], exported[up[1]] = exported[up[1]], exported[up[0]]
    config.save_pretrained(tmp_path / "swapped")
    write_folder(exported, tmp_path / "swapped")
    with pytest.raises(DataError, match=r"tensor model\.layers\.0\.mlp\.experts\.gate_up_proj read back"):
        require_noted(open_model(tmp_path / "swapped"), digests)


def test_choices_agree_where_they_are_as_good() -> None:
    reference = [torch.tensor([[1.0, 4.0], [4.0, 3.99]]), torch.tensor([[-8.0, 2.0], [0.0, 1.0]])]
    other = [torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])]
    assert agreement(reference, reference) == 1.0
    assert agreement(reference, other) == 0.5
    assert agreement(reference, other, tie=0.01) == 0.75
    assert largest_difference(reference, other) == 1.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(verify.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("verify_in_little_memory.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["model"] > 1e9
    assert took["grown"] <= 3 * took["largest"] + 300e6 < took["model"]
