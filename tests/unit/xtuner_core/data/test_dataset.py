"""Documents and packs on disk, and the batches of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.data.dataset import PackedDataset, write_documents, write_packs
from xtuner_core.data.loader import IGNORE, load_step, make_batch, packs_of_step, shared_beginning, steps_of
from xtuner_core.data.tokenize import Document

documents = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=30).map(
    lambda tokens: Document(np.array([i for i, _ in tokens], np.uint32), np.array([loss for _, loss in tokens], bool))
)


def written(folder: Path, shards: list[list[Document]], packs: list[list[int]]) -> PackedDataset:
    for index, shard in enumerate(shards):
        write_documents(folder / "documents" / f"{index:05d}", shard)
    write_packs(folder / "packs", packs)
    return PackedDataset(folder)


def same(left: Document, right: Document) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.loss, right.loss) and left.ids.dtype == right.ids.dtype


@given(shards=st.lists(st.lists(documents, max_size=5), min_size=1, max_size=4), data=st.data())
@settings(max_examples=100, deadline=None)
def test_documents_and_masks_come_back(tmp_path_factory: pytest.TempPathFactory, shards: list[list[Document]], data: st.DataObject) -> None:
    every = [document for shard in shards for document in shard]
    order = data.draw(st.permutations(range(len(every))))
    cut = data.draw(st.integers(0, len(every)))
    packs = [list(part) for part in (order[:cut], order[cut:]) if part]
    dataset = written(tmp_path_factory.mktemp("dataset"), shards, packs)
    assert all(same(dataset.document(number), document) for number, document in enumerate(every))
    assert [dataset.members(pack) for pack in range(len(dataset))] == packs


def test_a_batch_lays_documents_end_to_end_with_shifted_labels(tmp_path: Path) -> None:
    first = Document(np.array([5, 6, 7, 8], np.uint32), np.array([False, False, True, True]))
    second = Document(np.array([9], np.uint32), np.array([True]))  # nothing comes before it, so it cannot be learned
    third = Document(np.array([1, 2, 3], np.uint32), np.array([True, True, False]))
    batch = make_batch(written(tmp_path, [[first, second], [third]], [[0, 1, 2]]), 0)
    # Nothing learned depends on 8, 2 and 3 as inputs.
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 1]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, IGNORE, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0]]
    assert batch.boundaries.tolist() == [0, 3, 4, 5] and batch.boundaries.dtype == torch.int32
    assert (batch.longest, batch.text_tokens, batch.learned, batch.documents, batch.shared) == (3, 8, 3, (0, 1, 2), 0)


def test_what_all_documents_begin_with_stands_once_at_the_head_of_the_row(tmp_path: Path) -> None:
    learned = np.array([False, False, False, False, True])
    first = Document(np.array([1, 2, 3, 7, 8], np.uint32), learned)
    second = Document(np.array([1, 2, 3, 9, 4], np.uint32), learned)
    batch = make_batch(written(tmp_path, [[first, second]], [[0, 1]]), 0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 9]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 8, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3]]
    assert (batch.shared, batch.boundaries.tolist(), batch.text_tokens) == (3, [3, 4, 5], 10)


@pytest.mark.parametrize(
    ("ids", "learned", "shared"),
    [
        (([1, 2, 3], [1, 2, 4]), ([0, 0, 1], [0, 0, 1]), 1),  # token 2 predicts a learned token, each document its own
        (([1, 2, 3], [1, 2, 3]), ([0, 0, 0], [0, 0, 0]), 2),  # nothing learned; every document keeps a token of its own
        (([1, 2, 3], [5, 2, 3]), ([0, 0, 1], [0, 0, 1]), 0),
        (([1, 2, 3], [1, 2, 3]), ([1, 1, 1], [1, 1, 1]), 0),  # plain text: all learned
        (([1, 2, 3],), ([0, 0, 1],), 0),
    ],
)
def test_a_shared_beginning_never_hides_a_learned_token(ids: tuple, learned: tuple, shared: int) -> None:
    documents = [Document(np.array(row, np.uint32), np.array(mask, bool)) for row, mask in zip(ids, learned, strict=True)]
    assert shared_beginning(documents) == shared


@given(packs=st.integers(1, 40), batch=st.integers(1, 8), epochs=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_every_epoch_sees_every_pack_once(packs: int, batch: int, epochs: int, seed: int) -> None:
    steps = steps_of(packs, epochs, batch)
    stream = [pack for step in range(steps) for pack in packs_of_step(packs, step, batch, seed)]
    assert packs * epochs <= len(stream) < packs * epochs + batch
    for epoch in range(epochs):
        assert sorted(stream[epoch * packs : (epoch + 1) * packs]) == list(range(packs))


def test_epochs_and_seeds_shuffle_differently() -> None:
    one, two, other = (packs_of_step(50, step, 50, seed) for step, seed in ((0, 1), (1, 1), (0, 2)))
    assert one != two and one != other and one != sorted(one)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_the_packs_of_a_step(tiny_data: Path, world: int) -> None:
    dataset = PackedDataset(tiny_data)
    for step in (0, 5, 40):  # a later step needs no earlier one: resuming is starting there
        ranks = [load_step(dataset, step, 4, 7, rank, world) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {4 // world}
        seen = sorted(tuple(dataset.members(pack)) for pack in packs_of_step(len(dataset), step, 4, 7))
        assert sorted(batch.documents for batches in ranks for batch in batches) == seen


def test_prepared_packs_hold_what_the_report_says(tiny_data: Path) -> None:
    dataset = PackedDataset(tiny_data)
    batches = [make_batch(dataset, pack) for pack in range(len(dataset))]
    told = dataset.description
    assert max(batch.text_tokens for batch in batches) <= told["pack_length"]
    assert sum(batch.text_tokens for batch in batches) == told["tokens"]
    assert sum(batch.learned for batch in batches) == told["learned_tokens"]
    assert sorted(number for batch in batches for number in batch.documents) == list(range(told["accepted"]))
