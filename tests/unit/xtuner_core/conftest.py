"""The engine inside the test process: one rank of a real process group."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xtuner_core.config import SftConfig
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
def stop() -> Iterator[StopRequest]:
    """A real stop request; the handlers of the test process come back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sft_config(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., SftConfig]:
    """Fields of `train` → a run of the tiny model in a work directory of the test's own."""

    def config(**train: object) -> SftConfig:
        fields = {"total_step": 3, "lr": 5e-3, "dtype": "fp32", **train}
        places = {"model_dir": tiny_model_folder, "data_dir": tiny_data, "work_dir": tmp_path}
        return SftConfig.model_validate({**places, "train": fields})

    return config
