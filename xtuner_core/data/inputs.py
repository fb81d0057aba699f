"""Input files of every kind as rows, streaming: .jsonl, .json, .csv, .parquet and .arrow, each also as .gz or .zst.

A file is known by its name. Tables and unpacking are pyarrow's.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xtuner_core.data.json_array import array_rows
from xtuner_core.data.jsonl import MARK, Rejected, parse
from xtuner_core.data.row import Row, json_row, lines
from xtuner_core.data.tables import arrow_rows, csv_rows, parquet_rows
from xtuner_core.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
_BUFFER = 2**20
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` and repositories write beside the data."""
_SPLIT_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\b.*")


# Which files ------------------------------------------------------------------------------------------------------------------------


def input_files(patterns: Iterable[str | Path]) -> list[Path]:
    """The data files that paths, folders and globs mean, in a fixed order, each once.

    A folder means every file of a known kind below it, without hidden ones; of a data set that `datasets` saved, the Arrow files of
    its train split; where files are named `train-00000-of-00003.parquet`, as in a hub repository, those of the train split only.

    Raises:
        DataError: a pattern matches nothing, or a file or a saved data set is of no known kind.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for file in _found(pattern):
            files.setdefault(file.resolve(), Path(os.path.abspath(file)))  # a link in a hub's cache has the name, its target has not
    return list(files.values())


def _found(pattern: str | Path) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        kind_of(path)
        return [path]
    paths = [path] if path.is_dir() else [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    found = [file for one in paths for file in (_below(one) if one.is_dir() else [one] if _is_data(one) else [])]
    if not found:
        raise DataError(
            f"{pattern}: no such file, and no {', '.join(KINDS)} (or {', '.join(PACKED)} of one) matches it. "
            "Check data.train (relative to where you are, or to the project)."
        )
    return found


def _below(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        return _below(_train_split(folder))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_shards(folder)
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    splits = {child.name: shard["split"] for child in children if (shard := _SPLIT_SHARD.fullmatch(child.name))}
    if "train" in splits.values():
        children = [child for child in children if splits.get(child.name, "train") == "train"]
    folders = (child for child in children if child.is_dir() and not child.is_symlink())  # a link may lead in a circle
    return sorted([*(child for child in children if _is_data(child)), *(file for one in folders for file in _below(one))])


def _train_split(folder: Path) -> Path:
    if not (folder / "train").is_dir():
        raise DataError(f"{folder}: a saved data set without a train split. Name the folder of the split to use.")
    return folder / "train"


def _saved_shards(folder: Path) -> list[Path]:
    try:
        files = [folder / Path(entry["filename"]).name for entry in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'}: does not list the data files ({error!r}). Save the data set again.") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"{folder}: {', '.join(missing)} is missing; state.json lists it. Copy or save the data set again.")
    return files


def _is_data(path: Path) -> bool:
    return _kind(path) is not None and path.name not in _DESCRIPTIONS and path.is_file()


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def kind_of(file: Path) -> str:
    """One of KINDS.

    Raises:
        DataError: the name ends in none of them.
    """
    if kind := _kind(file):
        return kind
    raise DataError(
        f"{file}: not a kind of file that is read: {', '.join(KINDS)}, each also with {' or '.join(PACKED)}. Rename or convert it."
    )


def _is_packed(file: Path) -> bool:
    return file.name.lower().endswith(PACKED)


# Parts ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a file's lines: those that begin at byte `start` or later and before `end`. Only plain .jsonl files have several."""

    file: Path
    start: int = 0
    end: int | None = None


def parts_of(file: Path, size: int) -> list[Part]:
    """Parts of about `size` bytes, cut at line ends, that together hold every line once."""
    total = file.stat().st_size
    if kind_of(file) != ".jsonl" or _is_packed(file) or total <= size:
        return [Part(file)]
    with open(file, "rb") as stream:
        cuts = sorted({_line_end(stream, at) for at in range(size, total, size)} - {total})
    return [Part(file, start, end) for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def _line_end(stream: IO[bytes], offset: int) -> int:
    """Where the line ends that holds the byte before `offset`."""
    stream.seek(offset - 1)
    while (piece := stream.readline(_BUFFER)) and not piece.endswith(b"\n"):
        pass
    return stream.tell()


# Rows -------------------------------------------------------------------------------------------------------------------------------


def rows(part: Part) -> Iterator[Row]:
    """Every line, element or row of a part in order, in bounded memory: one that cannot be used says why.

    Raises:
        DataError: the file as a whole cannot be read: not of the kind that its name says, or damaged, so that rows would be lost.
    """
    number = 0
    try:
        for row in _reader(part):
            yield row
            number = row.number
    except OSError as error:
        if error.errno:
            raise
        raise DataError(f"{part.file}: damaged after row {number} ({error}). Write or download it again.") from None


def _reader(part: Part) -> Iterator[Row]:
    match kind_of(part.file):
        case ".jsonl":
            return _line_rows(part)
        case ".json":
            return _line_rows(part) if _first_line_is_a_record(part.file) else _stream_rows(part.file, array_rows)
        case ".csv":
            return _stream_rows(part.file, csv_rows)
        case ".parquet":
            return _seekable_rows(part.file, parquet_rows)
        case _:
            return _seekable_rows(part.file, arrow_rows)


def _line_rows(part: Part) -> Iterator[Row]:
    with _open(part.file) as stream:
        offset = part.start or len(stream.read(len(MARK)) if stream.peek(len(MARK)).startswith(MARK) else b"")
        if part.start:
            stream.seek(part.start)
        for number, (size, content) in enumerate(lines(stream), start=1):
            if part.end is not None and offset >= part.end:
                return
            yield Row(number, offset, blank=True) if content.isspace() else json_row(number, offset, size, content)
            offset += size


def _stream_rows(file: Path, reader: Callable[[IO[bytes], Path], Iterator[Row]]) -> Iterator[Row]:
    with _open(file) as stream:
        yield from reader(stream, file)


def _seekable_rows(file: Path, reader: Callable[[Any, Path], Iterator[Row]]) -> Iterator[Row]:
    """Tables are read from their end, so a packed one is unpacked into a temporary file."""
    import pyarrow as pa

    if not _is_packed(file):
        with pa.memory_map(str(file)) as table:
            yield from reader(table, file)
        return
    with tempfile.NamedTemporaryFile() as unpacked, _open(file) as stream:
        shutil.copyfileobj(stream, unpacked)
        unpacked.flush()
        with pa.memory_map(unpacked.name) as table:
            yield from reader(table, file)


def _open(file: Path) -> io.BufferedReader:
    if not _is_packed(file):
        return io.BufferedReader(io.FileIO(file), _BUFFER)
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file)), _BUFFER)  # type: ignore[arg-type] - a file of pyarrow's is a raw file


def _first_line_is_a_record(file: Path) -> bool:
    """Whether a .json file is in truth one of JSON lines, as many are: a whole value on the first line, and another line."""
    with _open(file) as stream:
        first = stream.readline(_BUFFER).removeprefix(MARK)
        if not first.endswith(b"\n") or not stream.readline(_BUFFER).strip():
            return False
    try:
        parse(first)
    except Rejected:
        return False
    return True
