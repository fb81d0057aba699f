"""The registry under kill -9 before each thing it does to the disk, and under several processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import model_registry, promotion
from pipelines.artifacts import Store
from pipelines.model_registry import Version
from tests.unit.pipelines.registry import in_use, registered, result

CHANGES = {"os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "open"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def ends_alive(work: Callable[[], object], deadly: int) -> bool:
    """Do the work in a process of its own, which is killed before the so many-th change of the disk; whether it came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in CHANGES and (event != "open" or arguments[1] is None or set("wax+") & set(str(arguments[1]))):
                seen += 1
                if seen == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) == 0


def promoted(store: Store) -> list[tuple[int, str, str]]:
    return [(entry.version, entry.what, entry.why) for entry in model_registry.history(store, "tickets") if entry.what != "registered"]


@pytest.mark.parametrize("change", ["promote", "rollback"])
def test_killed_at_any_instant_the_old_model_or_the_new_is_in_use_and_the_history_says_so(store: Store, change: str) -> None:
    one, two = registered(store, "one"), registered(store, "two")
    works: dict[str, tuple[list[Version], Callable[[], object], Version]] = {
        "promote": ([one], lambda: promotion.promote(store, two, "Ada", "killed"), two),
        "rollback": ([one, two], lambda: promotion.rollback(store, "tickets", "Ada", "killed"), one),
    }
    before, work, after = works[change]
    for version in before:
        promotion.promote(store, version, "Ada", "before")
    old, lines = model_registry.find(store, "tickets"), promoted(store)
    outcomes, deadly = set(), 0
    while not ends_alive(work, deadly := deadly + 1):
        now = model_registry.find(store, "tickets")
        assert in_use(store) == f"convert of {['one', 'two'][now.number - 1]}"
        told = promoted(store)
        assert told[: len(lines)] == lines
        assert [line[0] for line in told[len(lines) :]] == ([after.number] if now == after else [])
        assert promotion.succession(model_registry.history(store, "tickets"))[-1] == now.number
        outcomes.add(now.number)
        if now == after:  # back to the beginning, by the next process, which finds what was left undone
            if change == "promote":
                promotion.rollback(store, "tickets", "Ada", "undone")
            else:
                promotion.promote(store, two, "Ada", "undone")
            lines = promoted(store)
    assert model_registry.find(store, "tickets") == after
    assert outcomes == {old.number, after.number}, "no kill fell on either side of the change"
    assert deadly > 5


def test_killed_while_registering_the_next_one_makes_it_whole(store: Store, tmp_path: Path) -> None:
    result(store, "one")  # the stages, which are not what is killed
    deadly, alive = 0, False
    while not alive:
        deadly += 1
        copy = Store(shutil.copytree(store.root, tmp_path / str(deadly)))
        alive = ends_alive(lambda copy=copy: registered(copy, "one"), deadly)
        assert [version.title for version in model_registry.versions(copy, "tickets")] in ([], ["tickets@1"])
        assert registered(copy, "one").title == "tickets@1"
        assert [entry.what for entry in model_registry.history(copy, "tickets")] == ["registered"]
        assert [path.name for path in (copy.root / "models/tickets/versions").iterdir()] == ["0001"], "a draft was left"
    assert deadly > 5


def test_processes_side_by_side(store: Store) -> None:
    made = [registered(store, str(number)) for number in range(3)]

    def work(number: int) -> None:
        for _ in range(4):
            registered(Store(store.root), str(number))
            promotion.promote(Store(store.root), made[number], "Ada", str(number))

    children = []
    for number in range(3):
        if (child := os.fork()) == 0:
            work(number)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(model_registry.versions(store, "tickets")) == 3
    assert model_registry.find(store, "tickets").number == promoted(store)[-1][0]
