"""Packs read ahead: the same batches in the same order, and a thread that never outlives its loop."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import Batch, load_step, read_ahead
from xtuner_core.errors import DataError

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def numbered(step: int) -> list[Batch]:
    row = torch.full((1, 2), step)
    return [Batch(row, row, row, torch.tensor([0, 2], dtype=torch.int32), 2, (step,), 0, 2)]


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_steps_get_the_batches_they_would_have_read_themselves(tiny_data: Path, ahead: int) -> None:
    dataset = PackedDataset(tiny_data)

    def load(step: int) -> list[Batch]:
        return load_step(dataset, step, 2, 42, 1, 2)

    with read_ahead(load, range(3, 12), ahead, CPU) as batches:
        found = list(batches)
    assert len(found) == 9
    for step, [batch] in enumerate(found, 3):
        [expected] = load(step)
        assert batch.documents == expected.documents
        assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)


def test_not_more_than_so_many_steps_are_read_before_they_are_asked_for() -> None:
    read: list[int] = []

    def load(step: int) -> list[Batch]:
        read.append(step)
        return numbered(step)

    with read_ahead(load, range(10), 2, CPU) as batches:
        for step in range(4):
            assert next(batches)[0].documents == (step,)
            deadline = time.monotonic() + 20
            while len(read) < step + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert read == list(range(step + 3))
    assert len(read) == 6


def test_what_the_loop_does_meanwhile_is_not_waited_for() -> None:
    beside = threading.Barrier(2)  # passed by two at once only

    def load(step: int) -> list[Batch]:
        if step:
            beside.wait(20)
        return numbered(step)

    with read_ahead(load, range(3), 1, CPU) as batches:
        next(batches)
        for step in (1, 2):
            beside.wait(20)
            assert next(batches)[0].documents == (step,)


def test_an_error_comes_up_at_its_own_step_and_ends_the_thread() -> None:
    def load(step: int) -> list[Batch]:
        if step == 2:
            raise DataError("pack 7: gone")
        return numbered(step)

    seen: list[int] = []
    with pytest.raises(DataError, match="pack 7: gone"), read_ahead(load, range(9), 4, CPU) as batches:
        for batch in batches:
            seen.extend(batch[0].documents)
    assert seen == [0, 1] and threads() == []


def test_a_loop_that_is_left_by_an_exception_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), read_ahead(numbered, range(9), 2, CPU) as batches:
        next(batches)
        assert threads()
        raise KeyboardInterrupt
    assert threads() == []


def test_no_thread_without_reading_ahead_and_none_left_at_the_end() -> None:
    for ahead in (0, 2):
        with read_ahead(numbered, range(3), ahead, CPU) as batches:
            next(batches)
            assert len(threads()) == min(1, ahead)
        assert threads() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is for a GPU")
def test_batches_for_a_gpu_are_pinned_and_arrive_whole() -> None:
    device = torch.device("cuda", 0)
    with read_ahead(numbered, range(3), 2, device) as batches:
        for step, [batch] in enumerate(batches):
            assert batch.input_ids.is_pinned()
            assert batch.to(device).input_ids.tolist() == [[step, step]]
