"""Documents and packs on disk, and the batches of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.data import pack
from xtuner_core.data.dataset import DocumentsWriter, PackedDataset, Piece, join_documents, write_description, write_documents, write_packs
from xtuner_core.data.loader import IGNORE, load_step, make_batch, shared_beginning
from xtuner_core.data.order import grouped, packs_of_step, steps_of
from xtuner_core.data.pack import whole_documents
from xtuner_core.data.packing import best_fit, hard
from xtuner_core.data.tokenize import Document, Tokenized

documents = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=30).map(
    lambda tokens: Document(np.array([i for i, _ in tokens], np.uint32), np.array([loss for _, loss in tokens], bool))
)
few_kinds = st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=8).map(
    lambda tokens: Document(np.array([i for i, _ in tokens], np.uint32), np.array([loss for _, loss in tokens], bool))
)


def batch_of(documents: list[Document]) -> Tokenized:
    ids = np.concatenate([document.ids for document in documents] or [np.empty(0, np.uint32)])
    loss = np.concatenate([document.loss for document in documents] or [np.empty(0, bool)])
    return Tokenized(ids, loss, np.array([len(document.ids) for document in documents], np.int64))


def written(folder: Path, shards: list[list[Document]], packs: list[list[int]]) -> PackedDataset:
    for index, shard in enumerate(shards):
        write_documents(folder / "documents" / f"{index:05d}", [batch_of(shard)])
    lengths = np.array([len(document.ids) for shard in shards for document in shard], np.int64)
    numbers = np.array([number for pack in packs for number in pack], np.int64)
    write_packs(folder / "packs", whole_documents(numbers, lengths, np.array([len(pack) for pack in packs], np.int64)))
    return PackedDataset(folder)


def packs_only(folder: Path, count: int, costs: list[int] | None = None) -> PackedDataset:
    """A data set of which only the order is asked."""
    lengths = np.array(costs or [1] * count, np.int64)
    write_packs(folder / "packs", whole_documents(np.arange(count), lengths, np.ones(count, np.int64)))
    write_description(folder, {"order": "length_grouped"} if costs else {})
    return PackedDataset(folder)


def same(left: Document, right: Document) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.loss, right.loss) and left.ids.dtype == right.ids.dtype


@given(shards=st.lists(st.lists(documents, max_size=5), min_size=1, max_size=4), data=st.data())
@settings(max_examples=100)
def test_documents_and_masks_come_back(tmp_path_factory: pytest.TempPathFactory, shards: list[list[Document]], data: st.DataObject) -> None:
    every = [document for shard in shards for document in shard]
    order = data.draw(st.permutations(range(len(every))))
    cut = data.draw(st.integers(0, len(every)))
    packs = [list(part) for part in (order[:cut], order[cut:]) if part]
    dataset = written(tmp_path_factory.mktemp("dataset"), shards, packs)
    assert all(same(dataset.document(number), document) for number, document in enumerate(every))
    assert [dataset.members(pack) for pack in range(len(dataset))] == packs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(parts=st.lists(st.lists(documents, max_size=5), max_size=4))
@settings(max_examples=50)
def test_batches_and_joined_parts_are_the_bytes_of_one_batch(tmp_path_factory: pytest.TempPathFactory, parts: list[list[Document]]) -> None:
    root = tmp_path_factory.mktemp("parts")
    write_documents(root / "whole", [batch_of([document for part in parts for document in part])])
    write_documents(root / "batches", (batch_of(part) for part in parts))
    for number, part in enumerate(parts):
        write_documents(root / str(number), [batch_of(part)])
    join_documents([root / str(number) for number in range(len(parts))], root / "joined")
    assert contents(root / "whole") == contents(root / "batches") == contents(root / "joined")


def test_a_writer_that_fails_leaves_no_complete_looking_files(tmp_path: Path) -> None:
    def batches() -> Iterator[Tokenized]:
        yield batch_of([Document(np.array([1, 2], np.uint32), np.array([False, True]))])
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_documents(tmp_path / "documents", batches())
    assert len(np.load(tmp_path / "documents" / "offsets.npy")) == 0  # a whole one has at least one


def test_ten_gigabytes_open_at_once_and_take_no_memory(tmp_path: Path) -> None:
    length, count = 8192, 320_000
    shard = tmp_path / "documents" / "00000"
    shard.mkdir(parents=True)
    with open(shard / "ids.bin", "wb") as file:
        file.truncate(4 * length * count)  # a hole: it takes no room on the disk
    starts = np.arange(0, (count + 1) * length, length)
    np.save(shard / "offsets.npy", starts)
    np.save(shard / "loss.npy", np.stack([starts[:-1] + 100, starts[1:]], axis=1))
    np.save(shard / "loss_offsets.npy", np.arange(count + 1))
    write_packs(tmp_path / "packs", best_fit.pack(np.full(count, length), length, 0))
    assert (shard / "ids.bin").stat().st_size > 10**10
    before, started = resident(), time.process_time()
    dataset = PackedDataset(tmp_path)
    tokens = sum(make_batch(dataset, pack).text_tokens for pack in (0, count // 2, count - 1))
    assert time.process_time() - started < 0.1
    assert tokens == 3 * length and resident() - before < 20 * 2**20


def test_writing_and_joining_hold_one_batch_at_a_time(tmp_path: Path) -> None:
    tokens = 2**20
    batch = Tokenized(np.arange(tokens, dtype=np.uint32), np.arange(tokens) % 8 > 3, np.full(tokens // 256, 256))
    with DocumentsWriter(tmp_path / "warm") as writer:
        writer.write(batch)
    before, highest = resident(), 0
    with DocumentsWriter(tmp_path / "part") as writer:
        for _ in range(16):
            writer.write(batch)
            highest = max(highest, resident())
    with DocumentsWriter(tmp_path / "joined") as writer:
        for _ in range(3):
            writer.copy(tmp_path / "part")
            highest = max(highest, resident())
    assert (tmp_path / "joined" / "ids.bin").stat().st_size == 3 * 16 * 4 * tokens  # 200 MB, and 100 MB of loss ranges
    assert highest - before < 120 * 2**20


def resident() -> int:
    return psutil.Process().memory_info().rss


def batch_one_by_one(documents: list[Document]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Input ids, labels, positions and bounds of a pack, token by token."""
    needed = [max([1, *(t for t in range(len(d.ids)) if d.loss[t])]) if d.loss.any() else len(d.ids) for d in documents]
    shared = 0
    while len(documents) > 1 and all(
        shared + 1 < len(d.ids) and not d.loss[: shared + 2].any() and d.ids[shared] == documents[0].ids[shared] for d in documents
    ):
        shared += 1
    ids, labels, positions, bounds = [], [], [], [shared]
    for index, document in enumerate(documents):
        for t in range(0 if index == 0 else shared, needed[index]):
            ids.append(int(document.ids[t]))
            positions.append(t)
            labels.append(int(document.ids[t + 1]) if t + 1 < len(document.ids) and document.loss[t + 1] else IGNORE)
        bounds.append(len(ids))
    return ids, labels, positions, bounds


@given(every=st.lists(few_kinds, min_size=1, max_size=5))
@settings(max_examples=300)
def test_a_batch_is_what_its_definition_says(tmp_path_factory: pytest.TempPathFactory, every: list[Document]) -> None:
    dataset = written(tmp_path_factory.mktemp("dataset"), [every], [list(range(len(every)))])
    batch = make_batch(dataset, 0)
    found = (batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.position_ids[0].tolist(), batch.boundaries.tolist())
    assert found == batch_one_by_one(every)
    assert {part.dtype for part in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


@given(every=st.lists(few_kinds, min_size=1, max_size=6), capacity=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=200)
def test_a_piece_of_a_cut_document_is_a_document_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, every: list[Document], capacity: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("dataset")
    dataset = written(folder, [every[:2], every[2:]], [])
    packs = hard.pack(np.array([len(document.ids) for document in every]), capacity, seed)
    write_packs(folder / "cut", packs)
    dataset = PackedDataset(folder, split="cut")
    for number in range(len(packs)):
        slices = packs.slices[packs.offsets[number] : packs.offsets[number + 1]].tolist()
        batch = make_batch(dataset, number)
        found = (batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.position_ids[0].tolist(), batch.boundaries.tolist())
        assert found == batch_one_by_one([Document(every[doc].ids[a:b], every[doc].loss[a:b]) for doc, a, b in slices])
        assert (batch.documents, batch.text_tokens) == (tuple(doc for doc, _, _ in slices), sum(b - a for _, a, b in slices))


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
    spans = [[(first, first + 1) for first in np.flatnonzero(mask).tolist()] for mask in learned]
    assert shared_beginning([Piece(0, np.array(row, np.uint32), part) for row, part in zip(ids, spans, strict=True)]) == shared


@given(packs=st.integers(1, 40), batch=st.integers(1, 8), epochs=st.integers(1, 3), seed=st.integers(0, 2**31), grouped=st.booleans())
@settings(max_examples=200)
def test_every_epoch_sees_every_pack_once(
    tmp_path_factory: pytest.TempPathFactory, packs: int, batch: int, epochs: int, seed: int, grouped: bool
) -> None:
    costs = np.random.default_rng(seed).integers(1, 9, packs).tolist() if grouped else None
    dataset = packs_only(tmp_path_factory.mktemp("order"), packs, costs)
    steps = steps_of(packs, epochs, batch)
    stream = [pack for step in range(steps) for pack in packs_of_step(dataset, step, batch, seed)]
    assert packs * epochs <= len(stream) < packs * epochs + batch
    for epoch in range(epochs):
        assert sorted(stream[epoch * packs : (epoch + 1) * packs]) == list(range(packs))
    # A step is the same whatever was asked before.
    assert packs_of_step(PackedDataset(dataset.folder), steps - 1, batch, seed) == stream[(steps - 1) * batch :]


def test_epochs_and_seeds_shuffle_differently(tmp_path: Path) -> None:
    for name, costs in (("shuffled", None), ("grouped", list(range(1, 51)))):
        dataset = packs_only(tmp_path / name, 50, costs)
        one, two, other = (
            [pack for step in range(10) for pack in packs_of_step(dataset, 10 * epoch + step, 5, seed)]
            for epoch, seed in ((0, 1), (1, 1), (0, 2))
        )
        assert one != two and one != other and one != sorted(one)


def test_shuffled_is_the_permutation_it_always_was(tmp_path: Path) -> None:
    dataset = packs_only(tmp_path, 7)
    expected = [int(pack) for epoch in range(3) for pack in np.random.default_rng([9, epoch]).permutation(7)]
    assert [pack for step in range(7) for pack in packs_of_step(dataset, step, 3, 9)] == expected


def test_grouped_steps_cost_the_same_on_every_rank(tmp_path: Path) -> None:
    costs = np.random.default_rng(0).integers(1, 1000, 640)
    plain, even = packs_only(tmp_path / "plain", 640), packs_only(tmp_path / "even", 640, costs.tolist())
    for dataset, least, most in ((plain, 0.5, 2.0), (even, 0.0, 0.1)):
        stream = [pack for step in range(160) for pack in packs_of_step(dataset, step, 4, 0)]
        assert least <= pack.imbalance(costs[stream] ** 2, 4) <= most
    assert np.array_equal(even.costs, costs**2)


@pytest.mark.parametrize(("packs", "head"), [(20, 3), (17, 0), (3, 3), (2, 5), (0, 0)])
def test_grouped_leaves_the_steps_that_two_epochs_share(packs: int, head: int) -> None:
    order = np.random.default_rng(1).permutation(packs)
    found = grouped(order, np.arange(packs), head, 4, np.random.default_rng(2))
    tail = head + max(0, packs - head) // 4 * 4
    assert sorted(found) == list(range(packs)) and found[:head].tolist() == order[:head].tolist()
    assert found[tail:].tolist() == order[tail:].tolist()
    assert all((np.diff(step) == np.diff(sorted(step))).all() for step in found[head:tail].reshape(-1, 4))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_the_packs_of_a_step(tiny_data: Path, world: int) -> None:
    dataset = PackedDataset(tiny_data)
    for step in (0, 5, 40):  # a later step needs no earlier one: resuming is starting there
        ranks = [load_step(dataset, step, 4, 7, rank, world) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {4 // world}
        seen = sorted(tuple(dataset.members(pack)) for pack in packs_of_step(dataset, step, 4, 7))
        assert sorted(batch.documents for batches in ranks for batch in batches) == seen


def test_prepared_packs_hold_what_the_report_says(tiny_data: Path) -> None:
    dataset = PackedDataset(tiny_data)
    batches = [make_batch(dataset, pack) for pack in range(len(dataset))]
    told = dataset.description
    assert max(batch.text_tokens for batch in batches) <= told["pack_length"]
    assert sum(batch.text_tokens for batch in batches) == told["tokens"]
    assert sum(batch.learned for batch in batches) == told["learned_tokens"]
    assert sorted(number for batch in batches for number in batch.documents) == list(range(told["accepted"]))
