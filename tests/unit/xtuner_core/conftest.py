"""The engine inside the test process: one rank of a real process group."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import VALIDATION, PackedDataset, write_packs
from xtuner_core.data.pack import whole_documents
from xtuner_core.parallel.mesh import World, join_world
from xtuner_core.signals import StopRequest


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A world of one, joined as under torchrun."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        with join_world() as joined:
            yield joined


@pytest.fixture
def stop() -> StopRequest:
    """A real stop request."""
    return StopRequest()


@pytest.fixture
def sft_config(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., SftConfig]:
    """Fields of `train` → a run of the tiny model in a work directory of the test's own."""

    def config(**train: object) -> SftConfig:
        fields = {"total_step": 3, "lr": 5e-3, "dtype": "fp32", **train}
        places = {"model_dir": tiny_model_folder, "data_dir": tiny_data, "work_dir": tmp_path}
        return SftConfig.model_validate({**places, "train": fields})

    return config


HELD_BACK = [[3, 8, 1], [5], [9, 0, 2], [4, 7], [6]]
"""Packs of the documents 0 to 9; a number of packs that two ranks cannot share evenly."""


@pytest.fixture(scope="session")
def validated_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's data with a validation split."""
    folder = shutil.copytree(tiny_data, tmp_path_factory.mktemp("data") / "payload")
    dataset = PackedDataset(folder)
    lengths = np.array([len(dataset.document(number).ids) for number in range(10)])
    numbers = np.array([number for pack in HELD_BACK for number in pack])
    write_packs(folder / VALIDATION, whole_documents(numbers, lengths, np.array([len(pack) for pack in HELD_BACK])))
    return folder
