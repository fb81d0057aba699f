"""Exact and near duplicates: what is found is true, and what was planted is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.data import duplicates, ngrams
from xtuner_core.data.duplicates import LEAST_SHINGLES, SHINGLE, SIMILAR, find_duplicates
from xtuner_core.data.ngrams import Block, all_window_hashes, blocks, cuts, gather, prefix_sums, window_hashes


def shard(documents: list[np.ndarray]) -> Block:
    lengths = [len(document) for document in documents]
    return Block(np.concatenate([np.empty(0, np.uint32), *documents]).astype(np.uint32), np.cumsum([0, *lengths]))


def shingles(document: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(document[start : start + SHINGLE].tolist()) for start in range(len(document) - SHINGLE + 1)}


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    first, second = shingles(left), shingles(right)
    return len(first & second) / len(first | second)


documents_of_few_words = st.lists(st.lists(st.integers(0, 2), max_size=4).map(lambda ids: np.array(ids, np.uint32)), max_size=40)


@settings(max_examples=200)
@given(documents=documents_of_few_words, cut=st.integers(0, 40))
def test_exact_pairs_are_each_later_document_and_its_first_equal(documents: list[np.ndarray], cut: int) -> None:
    first: dict[bytes, int] = {}
    expected = []
    for number, document in enumerate(documents):
        if first.setdefault(document.tobytes(), number) != number:
            expected.append([first[document.tobytes()], number])
    found = find_duplicates([shard(documents[:cut]), shard(documents[cut:])])
    assert found.exact.tolist() == expected
    assert len(found.near) == 0


@settings(max_examples=100)
@given(
    ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50).map(lambda ids: np.array(ids, np.uint32)),
    length=st.integers(1, 10),
    before=st.lists(st.integers(0, 9), max_size=20),
)
def test_a_window_s_hash_is_that_of_its_tokens_wherever_they_stand(ids: np.ndarray, length: int, before: list[int]) -> None:
    hashes = all_window_hashes(prefix_sums(ids), length)
    assert len(hashes) == max(0, len(ids) - length + 1)
    moved = np.concatenate([np.array(before, np.uint32), ids])
    assert np.array_equal(all_window_hashes(prefix_sums(moved), length)[len(before) :], hashes) or len(ids) < length
    starts = np.arange(len(hashes))
    assert np.array_equal(window_hashes(prefix_sums(ids), starts, starts + length), hashes)
    windows = [tuple(ids[start : start + length].tolist()) for start in starts]
    assert len(set(windows)) == len(set(hashes.tolist()))


@given(lengths=st.lists(st.integers(0, 30), max_size=30), size=st.integers(1, 40))
def test_cuts_cover_everything_once_and_are_full_but_not_overfull(lengths: list[int], size: int) -> None:
    offsets = np.cumsum([0, *lengths])
    ranges = list(cuts(offsets, size))
    assert [index for start, end in ranges for index in range(start, end)] == list(range(len(lengths)))
    assert all(end - start == 1 or offsets[end] - offsets[start] <= size for start, end in ranges)
    assert all(offsets[end + 1] - offsets[start] > size for start, end in ranges[:-1])


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_gather_reads_any_documents_in_any_order(counts: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    shards = [[rng.integers(0, 9, size=rng.integers(0, 6)).astype(np.uint32) for _ in range(count)] for count in counts]
    documents = [document for part in shards for document in part]
    numbers = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=10)) if documents else []
    block = gather([shard(part) for part in shards], np.array(numbers, np.int64))
    assert [block.ids[start:end].tolist() for start, end in zip(block.offsets, block.offsets[1:], strict=False)] == [
        documents[number].tolist() for number in numbers
    ]


def planted(count: int, pairs: int, rng: np.random.Generator) -> tuple[list[np.ndarray], dict[int, int]]:
    """Random documents behind one system prompt; some later ones are earlier ones with a few tokens changed, in or out."""
    prompt = rng.integers(0, 50_000, 40)
    bodies = [rng.integers(0, 50_000, rng.integers(30, 150)) for _ in range(count)]
    order = rng.permutation(count)[: 2 * pairs].reshape(pairs, 2)
    order.sort(axis=1)
    for first, copy in order:
        at = rng.integers(0, len(bodies[first]))
        edit = [np.delete(bodies[first], at), np.insert(bodies[first], at, 7), np.append(bodies[first], [1, 2, 3])][rng.integers(3)]
        bodies[copy] = edit
    return [np.concatenate([prompt, body]).astype(np.uint32) for body in bodies], {int(copy): int(first) for first, copy in order}


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    documents, copies = planted(20_000, 600, np.random.default_rng(3))
    similarity = {copy: jaccard(documents[first][36:], documents[copy][36:]) for copy, first in copies.items()}
    parts = [shard(documents[start : start + 7000]) for start in range(0, 20_000, 7000)]
    found = find_duplicates(parts)
    assert len(found.exact) == 0
    assert all(copies.get(copy) == first for first, copy in found.near.tolist())
    wanted = {copy for copy, value in similarity.items() if value >= SIMILAR}
    assert len(wanted) > 300
    assert len(wanted & set(found.near[:, 1].tolist())) >= 0.95 * len(wanted)
    assert all(abs(similarity[copy] - told) < 0.02 for (_, copy), told in zip(found.near.tolist(), found.similarity, strict=True))


def test_the_answer_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, _ = planted(2000, 100, np.random.default_rng(4))
    documents += documents[:50]
    whole = find_duplicates([shard(documents)])
    assert (len(whole.exact), len(whole.near) > 60) == (50, True)
    monkeypatch.setattr(ngrams, "BLOCK", 3000)
    parts = [shard(documents[:1]), shard([]), shard(documents[1:])]
    assert len(list(blocks(parts))) > 50
    again = find_duplicates(parts)
    assert np.array_equal(whole.exact, again.exact)
    assert np.array_equal(whole.near, again.near)
    assert np.array_equal(whole.similarity, again.similarity)


def test_a_common_system_prompt_makes_no_near_duplicates() -> None:
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 1000, 500)
    documents = [np.concatenate([prompt, rng.integers(0, 1000, 40)]) for _ in range(30)]
    assert min(jaccard(documents[0], other) for other in documents) > SIMILAR
    assert len(find_duplicates([shard(documents)]).near) == 0


def test_short_documents_are_compared_as_a_whole_only() -> None:
    rng = np.random.default_rng(6)
    for length, expected in ((LEAST_SHINGLES + SHINGLE - 2, 0), (LEAST_SHINGLES + SHINGLE - 1, 1)):
        document = rng.integers(0, 1000, length)
        found = find_duplicates([shard([document, np.append(document, 5)])])
        assert len(found.near) == expected


def test_nothing_is_no_trouble() -> None:
    for shards in ([], [shard([])], [shard([np.array([1])])]):
        found = find_duplicates(shards)
        assert (found.exact.shape, found.near.shape, found.similarity.shape) == ((0, 2), (0, 2), (0,))


def test_a_search_that_would_take_too_long_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    common = random.integers(1000, size=400)
    data = shard([np.concatenate([common[:380], random.integers(1000, size=20)]) for _ in range(3)])
    whole = find_duplicates([data])
    assert whole.complete and len(whole.near) == 2
    monkeypatch.setattr(duplicates, "VERIFIED_AT_MOST", 300)
    ended = find_duplicates([data])
    assert not ended.complete and len(ended.near) == 0
