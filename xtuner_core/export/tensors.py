"""Models as streams: tensors that are read when asked for, and written as a Hugging Face folder without holding more than one."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from xtuner_core.checkpoint.hf import INDEX, header, weight_files
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError, RecipeError, from_os_error


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor whose numbers are read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    extents: tuple[Extent, ...] = ()
    """Where its bytes lie, one range of whole numbers after the other, if they lie in files as they are."""
    stream: Callable[[], Iterator[torch.Tensor]] | None = None
    """Its numbers in flat pieces, each valid until the next, if there is a cheaper way to them than to `read` all."""
    never_whole: bool = False
    """Its `stream` holds some pieces only, so that several such tensors can be written at once."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lazy:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @classmethod
    def stored(cls, shape: tuple[int, ...], dtype: torch.dtype, *extents: Extent) -> Lazy:
        """A tensor that lies in files; what is read of a single range is mapped memory, which is given back with the tensor."""
        return cls(shape, dtype, partial(_read, shape, dtype, extents), extents, partial(_stream, dtype, extents), never_whole=True)

    @property
    def bytes(self) -> int:
        """Of its numbers, in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same tensor, rounded once to `dtype` when it is read."""
        if dtype == self.dtype:
            return self
        return self.through(lambda part: part.to(dtype), dtype)

    def through(self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> Lazy:
        """The same tensor, each piece of which (or the whole, where it is read so) goes through `change`."""
        return Lazy(
            self.shape,
            dtype or self.dtype,
            lambda: change(self.read()),
            stream=lambda: map(change, self.pieces()),
            never_whole=self.never_whole,
        )

    def pieces(self) -> Iterator[torch.Tensor]:
        """Its numbers in their order, flat and a few at a time, each piece valid until the next. What must be computed whole is at once."""
        return self.stream() if self.stream else iter(self.read().reshape(-1).split(PIECE))


Tensors = Mapping[str, Lazy]
"""A model: name → tensor."""


def open_folder(folder: Path) -> dict[str, Lazy]:
    """The weights of a Hugging Face folder.

    Raises:
        DataError: a weight file is missing, damaged or shorter than its header says, or the index names one outside the folder.
    """
    return {name: tensor for file in weight_files(folder) for name, tensor in open_file(file).items()}


def open_file(file: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        DataError: it is missing, damaged or shorter than its header says, or has numbers of a type that torch has not.
    """
    entries = header(file)
    with open(file, "rb") as opened:
        start = 8 + struct.unpack("<Q", opened.read(8))[0]
    found: dict[str, Lazy] = {}
    for name, (shape, kind) in entries.items():
        if kind not in _DTYPES:
            raise DataError(f"{file}: the tensor {name} holds numbers of type {kind}, which cannot be converted.")
        size = math.prod(shape) * _DTYPES[kind].itemsize
        found[name] = Lazy.stored(shape, _DTYPES[kind], Extent(file, start, size))
        start += size  # the format leaves no gaps
    return found


def _read(shape: tuple[int, ...], dtype: torch.dtype, extents: tuple[Extent, ...]) -> torch.Tensor:
    """Mapped if it lies in one place where its numbers are aligned; else copied together."""
    parts = [extent for extent in extents if extent.size]
    if len(parts) == 1 and parts[0].start % dtype.itemsize == 0:
        return _mapped(parts[0]).view(dtype).view(shape)
    whole = torch.empty(shape, dtype=dtype)
    view, end = _bytes(whole), 0
    for part in parts:
        _read_into(view[end : end + part.size], part)
        end += part.size
    return whole


def _stream(dtype: torch.dtype, extents: tuple[Extent, ...]) -> Iterator[torch.Tensor]:
    """Through memory that is used again, which is faster than mapped or new memory: no page is touched for the first time."""
    numbers = torch.empty(min(PIECE, sum(extent.size for extent in extents) // dtype.itemsize), dtype=dtype)
    view = _bytes(numbers)
    for extent in extents:
        for done in range(0, extent.size, len(view) or 1):
            size = min(len(view), extent.size - done)
            _read_into(view[:size], Extent(extent.file, extent.start + done, size))
            yield numbers[: size // dtype.itemsize]


def _read_into(view: memoryview, extent: Extent) -> None:
    with open(extent.file, "rb", buffering=0) as file:
        file.seek(extent.start)
        while view:
            if not (count := file.readinto(view)):
                raise _shorter(extent.file)
            view = view[count:]


def _mapped(extent: Extent) -> torch.Tensor:
    """A range of a file as uint8, not copied; writing to it leaves the file alone. The mapping ends with the tensor."""
    before = extent.start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(extent.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), before + extent.size, access=mmap.ACCESS_COPY, offset=extent.start - before)
    except ValueError:
        raise _shorter(extent.file) from None
    return torch.frombuffer(pages, dtype=torch.uint8, count=extent.size, offset=before)


def _shorter(file: Path) -> DataError:
    return DataError(f"{file}: became shorter while it was read. Copy it again.")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16,
    "U16": torch.uint16, "I16": torch.int16, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their name in a safetensors file, in the order in which the library lays tensors out."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
PIECE = 1 << 22
"""Numbers (or bytes) that are handled at once where a whole tensor need not be; with fewer, the calls cost more than the work."""


def finite(tensors: Tensors) -> dict[str, Lazy]:
    """The same tensors; reading one that holds NaN or infinity raises a DataError that names it."""
    return {name: _finite(name, tensor) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def _finite(name: str, tensor: Lazy) -> Lazy:
    def checked(part: torch.Tensor) -> torch.Tensor:
        with _one_thread():
            if not all(map(_is_finite, part.reshape(-1).split(PIECE))):
                raise DataError(f"tensor {name} holds NaN or infinity as {tensor.dtype}; it is not written.")
        return part

    return tensor.through(checked)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For work on pieces: its threads would wait for each other longer than they work, on a busy machine ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_finite(part: torch.Tensor) -> bool:
    """Ten times as fast as `isfinite` of every number: the bounds of numbers with a NaN are NaN."""
    comparable = part if part.dtype.itemsize > 1 else part.float()  # torch does not compare floats of 8 bits
    return not part.numel() or all(bool(bound.isfinite()) for bound in comparable.aminmax())


def write_folder(tensors: Tensors, folder: Path, max_shard_size: str = "5GB", wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write weights as `model.safetensors`, or as numbered shards with an index if they need several; equal tensors give equal bytes.

    The bytes are those of the safetensors library; shards are cut as transformers cuts them, in the order of `tensors`.
    Those that come in pieces are written first, some at a time, the others one after the other. `wrote` is told the bytes of each.

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
            dict(tensors),
            get_storage_size=lambda one: one.bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise RecipeError(f"max_shard_size: {error}") from None


def write_file(path: Path, tensors: Tensors, wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write one safetensors file (StorageError: it cannot be written); see `write_folder`."""
    beginning, starts = _layout(tensors)

    def write(name: str) -> int:
        with open(path, "r+b", buffering=0) as file:
            file.seek(len(beginning) + starts[name])
            _write(file, name, tensors[name])
        return tensors[name].bytes

    try:
        with open(path, "wb", buffering=0) as file:
            _write_all(file, memoryview(beginning))
            for size in chain(_side_by_side(write, tensors), map(write, _one_by_one(tensors))):
                wrote(size)
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(OSError(error.errno, error.strerror, error.filename or str(path))) from None


def _one_by_one(tensors: Tensors) -> list[str]:
    """Tensors of which one in memory may be all that there is room for."""
    return [name for name, tensor in tensors.items() if not tensor.never_whole]


def _side_by_side(write: Callable[[str], int], tensors: Tensors) -> Iterator[int]:
    """The others, as many at a time as torch has threads; each is one thread's work."""
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with _one_thread():
            yield from pool.map(write, [name for name, tensor in tensors.items() if tensor.never_whole])
    finally:
        pool.shutdown(cancel_futures=True)


def _layout(tensors: Tensors) -> tuple[bytes, dict[str, int]]:
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


def _write(file: BinaryIO, name: str, tensor: Lazy) -> None:
    if tensor.extents:
        for extent in tensor.extents:
            _copy(file, extent)
        return
    parts, written = tensor.pieces(), 0  # what has to be computed as a whole is by now
    with _one_thread():
        for part in parts:
            if part.dtype != tensor.dtype:
                raise AssertionError(f"{name}: announced as {tensor.dtype}, read as {part.dtype}")
            _write_all(file, _bytes(part))
            written += part.nbytes
    if written != tensor.bytes:
        raise AssertionError(f"{name}: announced as {list(tensor.shape)}, but {written} bytes were read")


def _copy(file: BinaryIO, extent: Extent) -> None:
    """By sendfile: twice as fast as reading and writing, and as copy_file_range (what `cp` uses), on ext4 as in tmpfs."""
    with open(extent.file, "rb", buffering=0) as source:
        start, end = extent.start, extent.start + extent.size
        while start < end:
            copied = _copy_some(file, source, start, end - start)
            if not copied:
                raise _shorter(extent.file)
            start += copied


def _copy_some(file: BinaryIO, source: BinaryIO, start: int, size: int) -> int:
    try:
        return os.sendfile(file.fileno(), source.fileno(), start, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return file.write(os.pread(source.fileno(), min(size, PIECE), start))  # a file system that cannot


def _write_all(file: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
