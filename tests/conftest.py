"""What tests of every floor share: real model folders, made once and kept between runs, and no way to the hub."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest
from hypothesis import HealthCheck, settings

from pipelines import base_model, environments, prepare
from pipelines.artifacts import Store
from pipelines.recipe import PROJECT, load_recipe
from pipelines.stage import Work

TEST_STORE = PROJECT / ".environments" / "test-store"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell script, and so its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast examples come is a matter of what else the machine does, not of the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that share what their module makes once stay on one worker; all others go to whichever is free.

    (pytest-xdist 3.8 does not see groups under pytest 9.2, hence `pytest<9.2`; tests/arch looks whether it does.)
    """
    named = item.get_closest_marker("xdist_group")  # by a folder's own conftest.py, which comes first; two names would make a third
    if named is None and isinstance(item, pytest.Function) and "module" in _scopes(item):
        item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(PROJECT))))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """What a test and its fixtures run in this process may handle signals (training does); the next test finds the usual handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return (yield)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scopes(test: pytest.Function) -> set[str]:
    """Of its fixtures, direct and indirect."""
    return {found[-1].scope for found in test._fixtureinfo.name2fixturedefs.values()}


def _base_folder(recipe: str) -> Path:
    return Store(TEST_STORE).produce(base_model.STAGE, load_recipe(recipe), {}, print).artifact.payload / "model"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The demo's base model, fetched and imported by the real stage (about a minute the first time)."""
    return _base_folder("smollm2_135m_instruct_lora_tickets_e3")


@pytest.fixture(scope="session")
def tiny_model_folder() -> Path:
    """A random Qwen3 with a byte tokenizer."""
    return _base_folder("qwen3_tiny_full_openai")


@pytest.fixture(scope="session")
def prepare_place(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Work]:
    """A new, empty place for the prepare stage, with the tiny model as its input."""

    def place() -> Work:
        parts = {part: tmp_path_factory.mktemp(part) for part in ("payload", "record", "scratch", "cache")}
        return Work({"base": tiny_model_folder.parent}, **parts, log=print)

    return place


@pytest.fixture(scope="session")
def tiny_data(prepare_place: Callable[[], Work]) -> Path:
    """The tiny recipe's packed data."""
    work = prepare_place()
    prepare.run(load_recipe("qwen3_tiny_full_openai"), work)
    return work.payload


@pytest.fixture(scope="session")
def lmdeploy_python() -> Path:
    """LMDeploy's environment without CUDA, built by the real code (about a minute and a half the first time)."""
    return environments.ensure(f"lmdeploy{environments.WITHOUT_CUDA}", print)
