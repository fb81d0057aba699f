"""A store whose first two stages are whole, made once by the real stages and copied for each test; and pip without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
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


@pytest.fixture
def only_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder pip's only source of packages, whatever this machine has configured."""

    def use(folder: Path) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        config = tmp_path / "pip.conf"
        config.write_text(f"[global]\nno-index = true\nfind-links = {folder}\n", encoding="utf-8")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(config))

    return use
