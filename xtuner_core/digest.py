"""What content is called: hashes of files and of settings."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def key_of(ingredients: dict[str, Any]) -> str:
    """The name of what these ingredients make: the first 16 hex digits of the sha256 of their canonical JSON."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def library_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
