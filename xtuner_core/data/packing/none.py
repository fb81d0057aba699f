"""One document a pack. Elsewhere such rows are padded to a common length; here rows differ in length and padding never exists."""

from __future__ import annotations

import numpy as np

from xtuner_core.data.pack import Packs, require_fitting, whole_documents


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Every document by itself, in the order of the files (training shuffles packs anyway); `seed` is not used.

    Raises:
        ValueError: a document is longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    require_fitting(lengths, capacity)
    documents = np.flatnonzero(lengths)
    return whole_documents(documents, lengths, np.ones(len(documents), np.int64))
