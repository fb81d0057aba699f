"""The scripts in data/, as modules and as subprocesses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[3] / "data"


@pytest.fixture(scope="session")
def load_make() -> Callable[[str], ModuleType]:
    """FOLDER → the module data/FOLDER/make.py."""

    def load(folder: str) -> ModuleType:
        name = f"make_{folder}"
        spec = importlib.util.spec_from_file_location(name, DATA / folder / "make.py")
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run_make() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run data/FOLDER/make.py (or another copy of it) as a stranger would."""

    def run(folder: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = DATA / folder / "make.py"
        return subprocess.run([sys.executable, str(script), *arguments], check=False, capture_output=True, text=True, timeout=60)

    return run
