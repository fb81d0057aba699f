"""When a work directory has the whole result of what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xtuner_core.checkpoint import store
from xtuner_core.config import TrainConfig
from xtuner_core.parallel.mesh import World
from xtuner_core.work_dir import is_complete

DONE = TrainConfig(lr=1e-3, validation_interval=5)


@pytest.fixture
def work_dir(tmp_path: Path, world: World) -> Path:
    """With a result that an earlier version left, which did not know `train.weights` yet."""
    settings = {name: value for name, value in DONE.deciding().items() if name != "weights"}
    store.save(tmp_path / "final", {"a": torch.ones(3)}, {"step": 1, "seed": 42, "train": settings}, world)
    return tmp_path


@pytest.mark.parametrize("change", [{}, {"checkpoint_interval": 3}, {"validation_interval": 7}, {"recompute": "full"}])
def test_a_result_stays_one_also_of_a_version_with_fewer_settings(change: dict, work_dir: Path) -> None:
    assert is_complete(work_dir, DONE.model_copy(update=change), 42)


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"weights": "bf16"}, {"checkpoint_best": True}])
def test_what_decides_the_result_makes_another(change: dict, work_dir: Path) -> None:
    assert not is_complete(work_dir, DONE.model_copy(update=change), 42)
    assert not is_complete(work_dir, DONE, 43)
