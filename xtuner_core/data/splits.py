"""Which documents are trained on, and how often; which are kept back for the validation loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Portion:
    """The documents of one input file, and what they are for."""

    folder: Path
    sample_ratio: float
    validation: bool
    """The file is one of those given for validation: nothing in it is trained on."""
    salt: int
    """Decides, with the seed, which part of the documents a broken ratio takes; of the file itself, so that others change nothing."""


def split(portions: Sequence[Portion], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers over all portions, int64: those of one training epoch, and those of the validation split."""
    import numpy as np

    counts = [_count(portion) for portion in portions]
    ends = np.cumsum(counts, dtype=np.int64)
    held = [np.full(count, portion.validation) for portion, count in zip(portions, counts, strict=True)]
    if share:
        kept = kept_back(np.concatenate([fingerprints(portion.folder) for portion in portions]), share)
        held = np.split(kept, ends[:-1])
    numbers = np.split(np.arange(sum(counts), dtype=np.int64), ends[:-1])
    train = [
        in_an_epoch(own[~back], portion.sample_ratio, [seed, portion.salt])
        for own, back, portion in zip(numbers, held, portions, strict=True)
    ]
    return np.concatenate(train), np.concatenate([own[back] for own, back in zip(numbers, held, strict=True)])


def _count(portion: Portion) -> int:
    from xtuner_core.data.dataset import Documents

    return len(Documents(portion.folder))


def fingerprints(folder: Path) -> np.ndarray:
    """A number of 64 bits for each document, uint64 `[documents]`, that depends on its token ids only."""
    import numpy as np

    from xtuner_core.data.dataset import Documents

    sizes = np.diff(Documents(folder).offsets) * np.dtype(np.uint32).itemsize
    with open(folder / "ids.bin", "rb") as ids:  # read, not mapped: mapped pages would count as our memory
        digests = b"".join(hashlib.blake2b(ids.read(size), digest_size=8).digest() for size in sizes.tolist())
    return np.frombuffer(digests, dtype="<u8")


def kept_back(marks: np.ndarray, share: float) -> np.ndarray:
    """Which documents are for validation, bool `[documents]`: about `share` of them.

    A document's side depends on its content, not on its place or its neighbours: it stays there whatever files come and go, and equal
    documents are on one side. Of two or more different documents at least one is kept back, and at least one is not.
    """
    import numpy as np

    if not len(marks):
        return np.zeros(0, bool)
    chosen = marks < np.uint64(share * 2**64)
    if not chosen.any():
        chosen = marks == marks.min()
    return chosen if not chosen.all() else marks != marks.max()


def in_an_epoch(numbers: np.ndarray, sample_ratio: float, seed: Sequence[int]) -> np.ndarray:
    """The documents as often as the ratio says: 2 twice each, 0.5 a random half, 1.5 each once and a random half again."""
    import numpy as np

    times, rest = divmod(sample_ratio, 1.0)
    extra = np.random.default_rng(seed).permutation(len(numbers))[: round(rest * len(numbers))]
    return np.concatenate([np.tile(numbers, int(times)), numbers[np.sort(extra)]])
