"""A store whose first two stages are whole, made once by the real stages and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from pipelines.runner import run_until


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and prepare of the tiny recipe on its held-out chats (16 conversations)."""
    root = tmp_path_factory.mktemp("prepared") / "store"
    run_until("prepare", load_recipe("qwen3_tiny_full_openai", ["data.train=data/openai_chats/heldout.jsonl"]), Store(root), print)
    return root


@pytest.fixture
def prepared_store(prepared: Path, tmp_path: Path) -> Store:
    """A copy of it to damage."""
    shutil.copytree(prepared, tmp_path / "store")
    return Store(tmp_path / "store")
