"""Checkpoints on disk: whole or not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xtuner_core.checkpoint import store
from xtuner_core.errors import DataError
from xtuner_core.parallel.mesh import World

TENSORS = {"model.a": torch.arange(12.0).reshape(3, 4), "optim.b": torch.tensor(3.0), "rng.0.cpu": torch.arange(9, dtype=torch.uint8)}


@pytest.fixture
def work_dir(tmp_path: Path, world: World) -> Path:
    """With checkpoints of the steps 9, 10 and 11."""
    for step in (9, 10, 11):
        store.save(
            tmp_path / "checkpoints" / f"step-{step}", {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step}, world
        )
    return tmp_path


def flip_tensor(folder: Path) -> None:
    [file] = (folder / "tensors").iterdir()
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


def change_step(folder: Path) -> None:
    file = folder / "checkpoint.json"
    file.write_text(file.read_text().replace('"step": 11', '"step": 13'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in a tensor": flip_tensor,
    "a changed step": change_step,
    "no facts": lambda folder: (folder / "checkpoint.json").unlink(),
    "half the facts": lambda folder: (folder / "checkpoint.json").write_text("{"),
    "other facts": lambda folder: (folder / "checkpoint.json").write_text("[1]"),
    "a missing file": lambda folder: next((folder / "tensors").iterdir()).unlink(),
    "a file too many": lambda folder: (folder / "tensors" / "more.safetensors").touch(),
    "a cut file": lambda folder: next((folder / "tensors").iterdir()).write_bytes(b"x" * 50),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_used_when_the_newest_is_damaged(work_dir: Path, damage: str) -> None:
    newest = work_dir / "checkpoints" / "step-11"
    assert store.newest(work_dir) == newest
    DAMAGE[damage](newest)
    assert store.newest(work_dir) == work_dir / "checkpoints" / "step-10"
    with pytest.raises(DataError, match="step-11: the checkpoint is damaged or incomplete"):
        store.load_whole(newest)


def test_every_tensor_comes_back(work_dir: Path) -> None:
    folder = work_dir / "checkpoints" / "step-10"
    whole = store.load_whole(folder)
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    store.load(folder, into)
    assert whole.keys() == into.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(whole[name], tensor + 10) and torch.equal(into[name], tensor + 10) and whole[name].dtype == tensor.dtype
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert (facts["step"], facts["world_size"]) == (10, 1)


def test_old_checkpoints_go_drafts_do_not_count_and_saving_again_replaces(work_dir: Path, world: World) -> None:
    for step in (7, 12):
        (work_dir / "checkpoints" / f".step-{step}.draft" / "tensors").mkdir(parents=True)
    store.keep(work_dir, 12, 2, None)
    names = ["step-10", "step-11"]
    assert sorted(path.name for path in (work_dir / "checkpoints").glob("step-*")) == names
    store.save(work_dir / "checkpoints" / "step-12", TENSORS, {"step": 12}, world)  # over the draft of a run that was killed
    store.save(work_dir / "checkpoints" / "step-12", {"model.a": torch.ones(1)}, {"step": 12}, world)
    assert list(store.load_whole(work_dir / "checkpoints" / "step-12")) == ["model.a"]
    assert store.newest(work_dir / "checkpoints") is None
    assert not list((work_dir / "checkpoints").glob(".*"))


def test_equal_tensors_are_equal_bytes(tmp_path: Path, world: World) -> None:
    """Otherwise an artifact that was lost and rebuilt would make every stage below it run again."""
    saved = [tmp_path / f"step-{number}" for number in range(1, 9)]
    for folder in saved:
        store.save(folder, TENSORS, {"step": 1}, world)
    assert len({next((folder / "tensors").iterdir()).read_bytes() for folder in saved}) == 1
    assert len({(folder / "checkpoint.json").read_bytes() for folder in saved}) == 1
