"""Files that are whole or absent: write to a private name, fsync, rename, fsync the directory.

The order of operations follows Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), as SQLite and PostgreSQL use it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xtuner_core.errors import RecipeError


def sync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """fsync every file and directory below `root` (links are left alone)."""
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        sync_directory(Path(folder))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """Indented, key-sorted JSON: equal values are equal bytes; NaN is refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as `json_bytes`, atomically."""
    write_bytes(path, json_bytes(value))


def publish(source: Path, target: Path) -> None:
    """Move the finished directory `source` to `target`, which must not exist; both lie on one file system."""
    sync_tree(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    sync_directory(target.parent)


@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A place beside `target` for a new file or folder: it becomes `target` when the block ends well, and is deleted when it does not.

    Raises:
        RecipeError: there is something at `target`.
    """
    if target.exists():
        raise RecipeError(f"{target}: exists already; name a place where nothing is, or move it away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in _abandoned(target):
        remove(abandoned)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        yield draft
        if draft.is_dir():
            publish(draft, target)
        else:
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, target)
            sync_directory(target.parent)
    finally:
        remove(draft)


def _abandoned(target: Path) -> list[Path]:
    """Drafts of processes that were killed, and of one that had our number."""
    found = {draft: re.fullmatch(r"\.(.+)\.(\d+)\.(?:\w+\.)?draft", draft.name) for draft in target.parent.glob(".*.draft")}
    ours = {draft: int(name[2]) for draft, name in found.items() if name and name[1] == target.name}
    return [draft for draft, process in ours.items() if process == os.getpid() or not _runs(process)]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a directory tree if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
