"""A .npy file that grows: rows are appended, and the header is set right at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np


class NpyWriter:
    """Appends int64 rows of one shape to a new .npy file without holding them; within `with`, which completes the file.

    numpy leaves room in the header for the number of rows to grow (numpy.lib.format.GROWTH_AXIS_MAX_DIGITS).
    """

    def __init__(self, path: Path, row: tuple[int, ...] = ()) -> None:
        self._file = open(path, "xb")  # noqa: SIM115  # closed by __exit__
        self._row = row
        self._rows = 0
        self._write_header()

    def write(self, rows: np.ndarray) -> None:
        """Append `[rows, *row]`."""
        self._file.write(np.ascontiguousarray(rows, np.int64).reshape(-1, *self._row).data)
        self._rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._file.seek(0)
            self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._rows, *self._row)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<i8", "fortran_order": False, "shape": shape})
