"""What is noted while a model is written, and the comparison with what is read back; how logits are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xtuner_core.errors import DataError
from xtuner_core.export import verify
from xtuner_core.export.tensors import Lazy, open_folder, write_folder
from xtuner_core.export.verify import agreement, largest_difference, noted, require_bytes


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
    require_bytes(open_folder(tmp_path), digests)


@pytest.mark.parametrize("place", [0, 17, 58])
def test_another_bit_is_found(place: int, model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digests = written(model, tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1 - place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"tensor (a|b|c) read back from the exported folder is not what was written"):
        require_bytes(open_folder(tmp_path), digests)


def test_a_tensor_less_or_more_is_found(model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digests = written(model, tmp_path)
    found = open_folder(tmp_path)
    with pytest.raises(DataError, match="tensor d read back"):
        require_bytes({**found, "d": Lazy.of(torch.ones(1))}, digests)
    del found["b"]
    with pytest.raises(DataError, match="tensor b read back"):
        require_bytes(found, digests)


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
