"""Checkpoints on disk: safetensors written by DCP, published by rename, checked by sha256 before they are trusted.

WORK_DIR/checkpoints/step-N/tensors/*.safetensors
                           /checkpoint.json      step, world size, sha256 of every tensor file and of these facts themselves
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from xtuner_core.determinism import switches
from xtuner_core.digest import sha256
from xtuner_core.durable import publish, remove, write_json
from xtuner_core.errors import DataError, RecipeError, StorageError, from_os_error
from xtuner_core.export.checkpoint import open_checkpoint
from xtuner_core.parallel.mesh import World, gather_numbers

FACTS = "checkpoint.json"
SHOWN = 5
"""Differences that a message tells."""


def save(
    folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any], world: World, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint as the new directory `folder`, whole or absent; all ranks call it, and they meet in `group`.

    Only tensors may be given (DCP writes an unreadable file otherwise) and every rank writes its own file (`save_distributed`).

    Raises:
        StorageError: it cannot be written, on whichever rank; all ranks raise it.
    """
    draft = folder.with_name(f".{folder.name}.draft")

    def begin() -> None:
        for abandoned in folder.parent.glob(".*.draft"):  # of runs that were killed; only one is written at a time
            remove(abandoned)
        draft.mkdir(parents=True)

    def finish() -> None:
        for path in (draft / "tensors").iterdir():
            _sort_header(path)
        told = {**facts, **switches().facts(), "world_size": world.size, "files": _digests(draft)}
        write_json(draft / FACTS, {**told, "sha256": _digest(told)})
        remove(folder)
        publish(draft, folder)

    _by_first_rank(begin, world, group)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_tensors(whole, storage_writer=HuggingFaceStorageWriter(str(draft / "tensors"), save_distributed=True), process_group=group)
    except CheckpointException as error:
        raise StorageError(f"{folder}: the checkpoint cannot be written ({_reasons(error)}). Free space, or check the path.") from None
    _by_first_rank(finish, world, group)


def _by_first_rank(work: Callable[[], None], world: World, group: dist.ProcessGroup | None) -> None:
    """Rank 0 does it while the others wait; all raise its StorageError if it cannot."""
    reason = b""
    if world.rank == 0:
        try:
            work()
        except OSError as failure:
            reason = str(from_os_error(failure)).encode()
    if told := bytes(gather_numbers(reason, world, group)):
        raise StorageError(told.decode())


def _reasons(error: CheckpointException) -> str:
    return "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))


def _sort_header(path: Path) -> None:
    """Put a safetensors file's `__metadata__` in order: the library writes it in a random one, and equal tensors must be equal bytes."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def load(folder: Path, tensors: dict[str, torch.Tensor], partly: bool = False) -> None:
    """Fill `tensors` in place from a checkpoint of any world size; it may hold more if asked for `partly`.

    Raises:
        RecipeError: the checkpoint is of another model or method: names, shapes or types differ. Nothing is changed then.
        StorageError: a file cannot be read.
    """
    if different := differences(folder, tensors, partly):
        raise RecipeError(
            f"{folder}: a checkpoint of another model, method or optimizer: {different}. Undo the change, or choose another work_dir."
        )
    try:
        load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "tensors")))
    except CheckpointException as error:
        raise StorageError(f"{folder}: the checkpoint cannot be read ({_reasons(error)}).") from None


def described(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → (shape, type) of every tensor of a checkpoint."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in open_checkpoint(folder).items()}


def differences(folder: Path, tensors: dict[str, torch.Tensor], partly: bool = False) -> str:
    """The first few, empty if there are none: names, shapes, types. Random streams of ranks that are not here any more do not count."""
    saved = described(folder)
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    told = [f"{name} is not in it" for name in wanted if name not in saved]
    told += [f"{name} is too many" for name in saved if not (partly or name in wanted or name.startswith("rng."))]
    told += [
        f"{name} is {_kind(*saved[name])} there and {_kind(*wanted[name])} here"
        for name in wanted
        if saved.get(name, wanted[name]) != wanted[name]
    ]
    return "; ".join(told[:SHOWN]) + (f"; … ({len(told)} in all)" if len(told) > SHOWN else "")


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def newest(work_dir: Path, passed_over: Callable[[str], None] = lambda line: None) -> Path | None:
    """The last checkpoint whose files are all there with the right bytes; what is wrong with later ones is told."""
    for folder in reversed(published(work_dir)):
        if (damage := damage_of(folder)) is None:
            return folder
        passed_over(f"passed over {folder.name}: {damage}")
    return None


def published(work_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, the oldest first."""
    return sorted((work_dir / "checkpoints").glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    """Number of steps that were done when the checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def facts(folder: Path) -> dict[str, Any]:
    """What `save` was told beside the tensors."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def is_whole(folder: Path) -> bool:
    """Whether every file has the bytes it was saved with (DCP itself would load a flipped byte without a word)."""
    return damage_of(folder) is None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        told = facts(folder)
        if told.pop("sha256") != _digest(told):
            return f"{FACTS} is not what was saved"
        known, found = told["files"], _digests(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FACTS} or the tensors beside it cannot be read ({error!r})"
    missing = [f"tensors/{name} is missing" for name in known if name not in found]
    other = [f"tensors/{name} is not what was saved" for name in found if found[name] != known.get(name)]
    return "; ".join(missing + other) or None


def keep(work_dir: Path, step: int, count: int, best: int | None) -> None:
    """Of the checkpoints up to `step` remove all but the newest `count` and the one of step `best`."""
    folders = [folder for folder in published(work_dir) if step_of(folder) <= step]
    for folder in folders[:-count]:
        if step_of(folder) != best:
            remove(folder)


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor file; several at once, for hashing lets other threads run."""
    files = sorted((folder / "tensors").iterdir())
    with ThreadPoolExecutor(min(8, len(files)) or 1) as threads:
        return dict(zip([file.name for file in files], threads.map(sha256, files), strict=True))


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of any world size, unsharded, in this one process.

    Raises:
        DataError: a tensor file is missing or its bytes changed since it was saved.
    """
    if not is_whole(folder):
        raise DataError(f"{folder}: the checkpoint is damaged or incomplete. Run the training stage again.")
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}
