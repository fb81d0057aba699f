"""Engine checkpoints as streams, however their tensors are cut into parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xtuner_core.errors import DataError
from xtuner_core.export.checkpoint import open_checkpoint
from xtuner_core.export.tensors import write_folder

MATRIX, ROWS, VECTOR, NUMBER = torch.arange(60.0).view(6, 10), torch.randn(5, 3).bfloat16(), torch.arange(7), torch.tensor(3.0)
Part = tuple[torch.Tensor, tuple[int, ...]]
"""Numbers, and where they begin in the whole tensor."""


def save_part(folder: Path, rank: int, parts: dict[str, Part]) -> None:
    """As torch.distributed.checkpoint does with `save_distributed`."""
    (folder / "tensors").mkdir(parents=True, exist_ok=True)
    told = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": list(offset)} for name, (_, offset) in parts.items()})}
    numbers = {name: tensor.contiguous() for name, (tensor, _) in parts.items()}
    save_file(numbers, folder / "tensors" / f"shard-{rank:05d}-model-00001-of-00001.safetensors", told)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of two processes: a matrix cut into four blocks, another one by rows, a vector that is cut unevenly, a number that one has."""
    first: dict[str, Part] = {"rows": (ROWS[:3], (0, 0)), "vector": (VECTOR[:6], (0,)), "number": (NUMBER, ())}
    save_part(tmp_path, 2, {"matrix": (MATRIX[:4, :7], (0, 0)), "rows": (ROWS[3:], (3, 0)), "vector": (VECTOR[6:], (6,))})
    save_part(tmp_path, 1, {"matrix": (MATRIX[4:, :7], (4, 0)), **first})
    save_part(tmp_path, 3, {"matrix": (MATRIX[:4, 7:], (0, 7))})
    save_part(tmp_path, 4, {"matrix": (MATRIX[4:, 7:], (4, 7))})
    return tmp_path


def test_parts_become_whole_tensors(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    expected = {"matrix": MATRIX, "rows": ROWS, "vector": VECTOR, "number": NUMBER}
    assert opened.keys() == expected.keys()
    write_folder(opened, tmp_path)
    save_file(expected, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    for name, tensor in expected.items():
        assert torch.equal(opened[name].read(), tensor) and (opened[name].shape, opened[name].dtype) == (tuple(tensor.shape), tensor.dtype)
    assert [name for name in opened if not opened[name].extents] == ["matrix"]  # the others are copied from file to file


@pytest.mark.parametrize("rank", [1, 3])
def test_a_missing_part_is_told(checkpoint: Path, rank: int) -> None:
    next((checkpoint / "tensors").glob(f"shard-{rank:05d}-*")).unlink()
    with pytest.raises(DataError, match=r"parts of the tensor (matrix|vector) are missing"):
        open_checkpoint(checkpoint)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint of the engine"):
        open_checkpoint(tmp_path)
    (tmp_path / "tensors").mkdir()
    save_file({"a": NUMBER}, tmp_path / "tensors" / "a.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"a.safetensors: does not say which parts"):
        open_checkpoint(tmp_path)
    (tmp_path / "tensors" / "a.safetensors").write_bytes(b"no numbers")
    with pytest.raises(DataError, match=r"a.safetensors: not a whole safetensors file"):
        open_checkpoint(tmp_path)
