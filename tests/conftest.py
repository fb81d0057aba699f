"""What tests of every floor share: real model folders, made once and kept between runs, and no way to the hub."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest  # noqa: E402

from pipelines import base_model  # noqa: E402
from pipelines.artifacts import Store  # noqa: E402
from pipelines.recipe import PROJECT, load_recipe  # noqa: E402

TEST_STORE = PROJECT / ".environments" / "test-store"


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
def prepare_data(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Work]:
    """Run the real prepare stage of the tiny recipe: `--set` overrides → where it wrote, also if it failed."""

    def prepare_with(*overrides: str, work: Work | None = None) -> Work:
        work = work or new_work(tmp_path_factory.mktemp("prepared"), tiny_model_folder)
        prepare.run(load_recipe("qwen3_tiny_full_openai", overrides), work)
        return work

    return prepare_with
