"""Models as streams: tensors that are read when asked for, and written as a Hugging Face folder without holding more than one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from xtuner_core.checkpoint.hf import weight_files


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor whose numbers are read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

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
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_folder(tensors: Tensors, folder: Path, max_shard_size: str = "5GB", wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write weights as `model.safetensors`, or as numbered shards with an index if they need several.

    `wrote` is told the bytes of each tensor as it is written.

    Raises:
        StorageError: it cannot be written.
    """
    raise NotImplementedError
