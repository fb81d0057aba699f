"""The validation split and the ratio: stable under everything that does not touch a document itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner_core.data.dataset import write_documents
from xtuner_core.data.splits import Portion, fingerprints, in_an_epoch, kept_back, split
from xtuner_core.data.tokenize import Tokenized

Rows = list[list[int]]


def written(folder: Path, rows: Rows) -> Path:
    ids = np.array([token for row in rows for token in row], np.uint32)
    write_documents(folder, [Tokenized(ids, np.ones(len(ids), bool), np.array([len(row) for row in rows], np.int64))])
    return folder


def portions(root: Path, *files: Rows, ratio: float = 1.0) -> list[Portion]:
    return [Portion(written(root / f"{number}", rows), ratio, False, number) for number, rows in enumerate(files)]


def sides(root: Path, share: float, *files: Rows) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Contents of the documents for training and for validation."""
    every = [tuple(row) for rows in files for row in rows]
    train, held = split(portions(root, *files), share, seed=1)
    assert sorted([*train, *held]) == list(range(len(every)))
    return {every[number] for number in train}, {every[number] for number in held}


def numbered(count: int, start: int = 0) -> Rows:
    return [[start + number, 7, 7] for number in range(count)]


def test_about_the_share_is_kept_back(tmp_path: Path) -> None:
    _, held = sides(tmp_path, 0.2, numbered(5000))
    assert 900 < len(held) < 1100


def test_a_document_stays_on_its_side_whatever_files_come_and_go(tmp_path: Path) -> None:
    first, second, third = numbered(300), numbered(300, 1000), numbered(300, 2000)
    train, held = sides(tmp_path / "all", 0.1, first, second, third)
    alone_train, alone_held = sides(tmp_path / "one", 0.1, second[::-1])
    assert alone_train <= train and alone_held <= held and alone_held


def test_a_greater_share_keeps_what_a_smaller_one_kept(tmp_path: Path) -> None:
    _, small = sides(tmp_path / "a", 0.05, numbered(500))
    _, great = sides(tmp_path / "b", 0.3, numbered(500))
    assert small < great


@given(marks=st.lists(st.integers(0, 2**64 - 1), max_size=30), share=st.floats(0.0001, 0.9999))
def test_both_sides_hold_something_and_equal_documents_stay_together(marks: list[int], share: float) -> None:
    array = np.array(marks, np.uint64)
    chosen = kept_back(array, share)
    assert chosen.dtype == bool and len(chosen) == len(marks)
    if len(set(marks)) >= 2:
        assert chosen.any() and not chosen.all()
    else:
        assert not chosen.any(), "a single document is trained on"
    assert not {mark for mark, back in zip(marks, chosen, strict=True) if back} & {
        m for m, back in zip(marks, chosen, strict=True) if not back
    }


def test_fingerprints_are_of_the_ids_alone(tmp_path: Path) -> None:
    one = fingerprints(written(tmp_path / "a", [[1, 2], [1], [], [1, 2], [2, 1]]))
    other = fingerprints(written(tmp_path / "b", [[1, 2]]))
    assert one[0] == one[3] == other[0]
    assert len(set(one.tolist())) == 4


def test_own_files_are_never_trained_on(tmp_path: Path) -> None:
    files = portions(tmp_path, numbered(10), numbered(5))
    own = Portion(files[1].folder, 1.0, True, 1)
    train, held = split([files[0], own], 0.0, seed=1)
    assert (train.tolist(), held.tolist()) == (list(range(10)), list(range(10, 15)))


@pytest.mark.parametrize(
    ("ratio", "counts"), [(1.0, {1: 10}), (2.0, {2: 10}), (0.5, {1: 5}), (1.5, {1: 5, 2: 5}), (0.01, {}), (0.25, {1: 2})]
)
def test_the_ratio_says_how_often(ratio: float, counts: dict[int, int]) -> None:
    chosen = in_an_epoch(np.arange(100, 110), ratio, [1, 2])
    assert Counter(Counter(chosen.tolist()).values()) == counts
    assert set(chosen.tolist()) <= set(range(100, 110))


def test_the_random_part_is_of_the_seed_and_the_file() -> None:
    numbers = np.arange(1000)
    half = in_an_epoch(numbers, 0.5, [1, 2])
    assert np.array_equal(half, in_an_epoch(numbers, 0.5, [1, 2]))
    assert all(not np.array_equal(half, in_an_epoch(numbers, 0.5, seed)) for seed in ([2, 2], [1, 3]))


def test_what_is_kept_back_is_not_repeated(tmp_path: Path) -> None:
    train, held = split(portions(tmp_path, numbered(100), ratio=2.0), 0.2, seed=1)
    assert set(Counter(train.tolist()).values()) == {2}
    assert set(Counter(held.tolist()).values()) == {1}
    assert not set(train.tolist()) & set(held.tolist())


def test_files_without_documents_are_no_trouble(tmp_path: Path) -> None:
    train, held = split(portions(tmp_path, [], numbered(3), []), 0.4, seed=1)
    assert sorted([*train, *held]) == [0, 1, 2] and len(held)
    train, held = split(portions(tmp_path / "none", []), 0.4, seed=1)
    assert (len(train), len(held), train.dtype) == (0, 0, np.int64)
