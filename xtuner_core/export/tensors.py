"""Models as streams: tensors that are read when asked for, and written as a Hugging Face folder without holding more than one."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open

from xtuner_core.checkpoint.hf import INDEX, weight_files
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError, from_os_error


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor whose numbers are read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lazy:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def bytes(self) -> int:
        """Of its numbers, in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same tensor, rounded once to `dtype` when it is read."""
        return Lazy(self.shape, dtype, lambda: self.read().to(dtype))


Tensors = Mapping[str, Lazy]
"""A model: name → tensor."""


def open_folder(folder: Path) -> dict[str, Lazy]:
    """The weights of a Hugging Face folder.

    Raises:
        DataError: a weight file is missing or its header is damaged.
    """
    found: dict[str, Lazy] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                part = tensors.get_slice(name)
                found[name] = Lazy(tuple(part.get_shape()), _DTYPES[part.get_dtype()], partial(_read, file, name))
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16,
    "U16": torch.uint16, "I16": torch.int16, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their name in a safetensors file, in the order in which the library lays tensors out."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
PATTERN = "model{suffix}.safetensors"


def write_folder(tensors: Tensors, folder: Path, max_shard_size: str = "5GB", wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write weights as `model.safetensors`, or as numbered shards with an index if they need several; equal tensors give equal bytes.

    The bytes are those of the safetensors library; shards are cut as transformers cuts them, in the order of `tensors`.
    Tensors are read and written one after the other in that order. `wrote` is told the bytes of each as it is written.

    Raises:
        StorageError: it cannot be written.
        RecipeError: `max_shard_size` is not a size such as `5GB`.
    """
    split = _split(tensors, max_shard_size)
    for name, held in split.filename_to_tensors.items():
        write_file(folder / name, {tensor: tensors[tensor] for tensor in held}, wrote)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _split(tensors: Tensors, max_shard_size: str) -> StateDictSplit:
    try:
        return split_state_dict_into_shards_factory(
            dict(tensors), get_storage_size=lambda tensor: tensor.bytes, filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise RecipeError(f"max_shard_size: {error}") from None


def write_file(path: Path, tensors: Tensors, wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write one safetensors file (StorageError: it cannot be written); see `write_folder`."""
    header, starts = _header(tensors)
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(header)
            for name, tensor in tensors.items():
                file.seek(len(header) + starts[name])
                _write_all(file, _bytes(name, tensor))
                wrote(tensor.bytes)
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(OSError(error.errno, error.strerror, error.filename or str(path))) from None


def _header(tensors: Tensors) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where behind it each tensor begins: wide types first, then by name, as the library does."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name.encode())):
        starts[name], end = end, end + tensors[name].bytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text, starts


def _bytes(name: str, tensor: Lazy) -> memoryview:
    found = tensor.read()
    if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
        raise AssertionError(f"{name}: announced as {tensor.dtype} {tensor.shape}, read as {found.dtype} {tuple(found.shape)}")
    return memoryview(found.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _write_all(file: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
