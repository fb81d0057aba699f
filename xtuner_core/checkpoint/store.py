"""Checkpoints on disk: safetensors written by DCP, published by rename, checked by sha256 before they are trusted.

WORK_DIR/checkpoints/step-N/tensors/*.safetensors
                           /checkpoint.json      step, world size, sha256 of every tensor file and of these facts themselves
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from xtuner_core.durable import publish, remove, write_json
from xtuner_core.errors import DataError
from xtuner_core.parallel.mesh import World


def save(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any], world: World) -> None:
    """Write a checkpoint as the new directory `folder`, whole or absent; all ranks call it.

    Only tensors may be given (DCP writes an unreadable file otherwise) and every rank writes its own file (`save_distributed`).
    """
    draft = folder.with_name(f".{folder.name}.draft")
    if world.rank == 0:
        remove(draft)
        draft.mkdir(parents=True)
    dist.barrier()
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(whole, storage_writer=HuggingFaceStorageWriter(str(draft / "tensors"), save_distributed=True))
    dist.barrier()
    if world.rank == 0:
        for path in (draft / "tensors").iterdir():
            _sort_header(path)
        told = {**facts, "world_size": world.size, "files": _digests(draft)}
        write_json(draft / "checkpoint.json", {**told, "sha256": _digest(told)})
        remove(folder)
        publish(draft, folder)
    dist.barrier()


def _sort_header(path: Path) -> None:
    """Put a safetensors file's `__metadata__` in order: the library writes it in a random one, and equal tensors must be equal bytes."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint of any world size."""
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "tensors")))


def newest(work_dir: Path) -> Path | None:
    """The last checkpoint whose files are all there with the right bytes; damaged ones are passed over."""
    folders = sorted((work_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    return next((folder for folder in folders if is_whole(folder)), None)


def facts(folder: Path) -> dict[str, Any]:
    """What `save` was told beside the tensors."""
    return json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))


def is_whole(folder: Path) -> bool:
    """Whether every file has the bytes it was saved with (DCP itself would load a flipped byte without a word)."""
    try:
        told = facts(folder)
        return told.pop("sha256") == _digest(told) and told["files"] == _digests(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def keep_newest(work_dir: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    folders = sorted((work_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for folder in folders[:-count]:
        remove(folder)


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted((folder / "tensors").iterdir()):
        with open(path, "rb") as handle:
            digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of any world size, unsharded, in this one process.

    Raises:
        DataError: a tensor file is missing or its bytes changed since it was saved.
    """
    if not is_whole(folder):
        raise DataError(f"{folder}: the checkpoint is damaged or incomplete. Run the training stage again.")
    reader = HuggingFaceStorageReader(str(folder / "tensors"))
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
        load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "tensors")), no_dist=True)
    return tensors
