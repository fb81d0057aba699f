"""What content is called: hashes of files and of settings."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, distribution, version
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
    """Installed version of a distribution, without importing it, and without reading more of what is said of it: `version` takes 5 ms."""
    try:
        told = re.search(r"^Version: (.+)$", distribution(name).read_text("METADATA") or "", re.MULTILINE)
    except PackageNotFoundError:
        return None
    return told[1].strip() if told else version(name)
