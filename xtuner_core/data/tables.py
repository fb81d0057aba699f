"""Tables as rows: .csv, .parquet and Arrow files, a batch at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from xtuner_core.data.jsonl import MARK, MAX_LINE_BYTES, Rejected, parse_text, too_long
from xtuner_core.data.row import Row, lines
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 128
_JSON_COLUMNS = {"messages", "dialogs", "conversations", "conversation", "tools", "history", "reward_model", "extra_info"}
_TEXT_OR_JSON_COLUMNS = {"prompt", "chosen", "rejected"}


class _TextLines:
    """Lines for the csv module, which goes on after one that raises, as a generator could not; `offset` is that of the next line."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = lines(stream)
        self.offset = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        size, content = next(self._lines)
        first, self.offset = self.offset == 0, self.offset + size
        if size > len(content):
            raise Rejected(too_long(size))
        text = content.removeprefix(MARK) if first else content
        return text.decode("utf-8", "surrogateescape")  # so that one bad cell costs one row


def csv_rows(stream: IO[bytes], file: Path) -> Iterator[Row]:
    """Rows of a comma-separated table (RFC 4180) with a header row, as dictionaries; messages and the like hold JSON.

    Raises:
        DataError: the header is unreadable or names a column twice.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    source = _TextLines(stream)
    reader = csv.reader(source, strict=True)
    header = _header(reader, file)
    number = 0
    while header:
        number, offset = number + 1, source.offset
        try:
            cells = next(reader)
            yield Row(number, offset, _record(header, cells)) if cells else Row(number, offset, blank=True)
        except StopIteration:
            return
        except csv.Error as error:
            open_quote = " (a quote is never closed: this row holds all that follows)" if "end of data" in str(error) else ""
            yield Row(number, offset, reason=f"not CSV: {error}{open_quote}")
        except Rejected as reason:
            yield Row(number, offset, reason=str(reason))


def _header(reader: Iterator[list[str]], file: Path) -> list[str]:
    try:
        header = next(reader, [])
    except (csv.Error, Rejected) as error:
        raise DataError(f"{file}: the header row cannot be read ({error}). Save the table as UTF-8 with commas.") from None
    if len(set(header)) < len(header) or not all(map(_is_utf8, header)):
        raise DataError(f"{file}: a column is named twice, or its name is not UTF-8, in the header row {header!a}.")
    return header


def _record(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise Rejected(f"{len(cells)} cells, the header has {len(header)}")
    values = ((name, _cell(name, text)) for name, text in zip(header, cells, strict=True))
    return {name: value for name, value in values if value is not None}


def _cell(name: str, text: str) -> Any:
    if not _is_utf8(text):
        raise Rejected(f"column {name}: not UTF-8")
    if name in _JSON_COLUMNS:
        if not text.strip():
            return None
        try:
            return parse_text(text)
        except Rejected as reason:
            raise Rejected(f"column {name}: {reason}") from None
    if name in _TEXT_OR_JSON_COLUMNS and text.startswith("[{"):
        try:
            return parse_text(text)
        except Rejected:
            return text
    return text


def _is_utf8(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def parquet_rows(source: Any, file: Path) -> Iterator[Row]:
    """Rows of a Parquet file (a path or an open file) as dictionaries, without the fields that are null.

    Raises:
        DataError: not Parquet, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source, buffer_size=2**20) as table:
            yield from _batch_rows(table.iter_batches(batch_size=_BATCH_ROWS, use_threads=False))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, "Parquet", error) from None


def arrow_rows(source: Any, file: Path) -> Iterator[Row]:
    """Rows of an Arrow stream, as `datasets` saves them, or of an Arrow file; else like `parquet_rows`."""
    import pyarrow as pa

    try:
        begins_as_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pa.ipc.open_file(source) if begins_as_file else pa.ipc.open_stream(source) as reader:
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if begins_as_file else reader
            yield from _batch_rows(_slices(batches))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, "Arrow", error) from None


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts the offsets in a file; a wrong one would read memory that is not ours
        yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, len(batch), _BATCH_ROWS))


def _unreadable(file: Path, kind: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno:
        return error
    return DataError(f"{file}: not {kind}, or damaged ({' '.join(str(error).split())}). Write or download it again.")


def _batch_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in _values(batch):
            number += 1
            yield Row(number, -1, reason=str(value)) if isinstance(value, Rejected) else Row(number, -1, value)


def _values(batch: pa.RecordBatch) -> list[Any]:
    """The rows of a batch as plain Python; one that cannot be is a Rejected."""
    try:
        return [_without_nulls(value) for value in batch.to_pylist(maps_as_pydicts="strict")]
    except (ValueError, KeyError, ArithmeticError, RecursionError) as error:  # not UTF-8, a date beyond Python's, a key twice
        if len(batch) == 1:
            return [Rejected(f"a value cannot be read: {error}")]
        return [value for at in range(len(batch)) for value in _values(batch.slice(at, 1))]


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all fields that any row has; the null ones were never there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
