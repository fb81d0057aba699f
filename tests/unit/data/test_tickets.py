"""The ticket-routing set: it is what its README promises, and not solvable by spotting one word."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[3] / "data"
FOLDERS = ("tickets", "openai_chats", "hostile", "general")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def make(load_make: Callable[[str], ModuleType]) -> ModuleType:
    return load_make("tickets")


def _rows(split: str) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in (DATA / "tickets" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_files_are_what_the_script_writes(folder: str, run_make: Run) -> None:
    assert run_make(folder, "--check").returncode == 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_check_notices_a_changed_file_and_make_restores_every_byte(folder: str, run_make: Run, tmp_path: Path) -> None:
    copy = tmp_path / folder
    shutil.copytree(DATA / folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
    first, *_ = sorted(copy.glob("*.jsonl"))
    original = first.read_bytes()
    first.write_bytes(original.replace(b"a", b"b", 1))
    failed = run_make(copy, "--check")
    assert (failed.returncode, first.name in failed.stdout) == (1, True)
    assert run_make(copy).returncode == 0
    assert first.read_bytes() == original


def test_enough_conversations_and_none_twice() -> None:
    train, heldout = _rows("train"), _rows("heldout")
    assert len(train) >= 800 and len(heldout) >= 200
    texts = [text for text, _ in train + heldout]
    assert len(set(texts)) == len(texts)


def test_every_queue_is_balanced_and_told_apart_by_its_first_word(make: ModuleType) -> None:
    assert len({name.split()[0] for name in make.ALL_QUEUES}) == len(make.ALL_QUEUES) >= 8
    for split in ("train", "heldout"):
        counts = Counter(queue for _, queue in _rows(split))
        assert set(counts) == set(make.ALL_QUEUES)
        assert max(counts.values()) <= 2 * min(counts.values())


def test_messages_are_short_ascii_without_unfilled_slots() -> None:
    for text, _ in _rows("train") + _rows("heldout"):
        assert text.isascii() and text == text.strip() and len(text) <= 180
        assert not re.search(r"[{}]|  ", text)


def test_no_heldout_sentence_pattern_is_in_training(make: ModuleType) -> None:
    train, heldout = make.tickets("train"), make.tickets("heldout")
    seen = {template for ticket in train for template in ticket.templates}
    assert not seen & {template for ticket in heldout for template in ticket.templates}
    make.check_apart(train, heldout)
    with pytest.raises(SystemExit, match="both splits"):
        make.check_apart(train, train[:1])


def test_overrides_decide_about_a_third(make: ModuleType) -> None:
    for split in ("train", "heldout"):
        rules = Counter(ticket.rule for ticket in make.tickets(split))
        assert 0.25 < (rules["concierge"] + rules["nordic"]) / rules.total() < 0.35


@pytest.mark.parametrize(
    ("topic", "plan", "region", "queue"),
    [
        ("injury", "Orchid", "Nordics", "Amber Room"),
        ("injury", None, None, "Amber Room"),
        ("billing", "Orchid", "Nordics", "Velvet Lounge"),
        ("theft", "Orchid", None, "Velvet Lounge"),
        ("billing", "Fern", "Nordics", "Birch Office"),
        ("billing", None, "Nordics", "Birch Office"),
        ("repair", "Fern", "Nordics", "Birch Office"),
        ("repair", "Fern", "Isles", "Wrench Bay"),
        ("billing", "Clover", "Alps", "Copper Ledger"),
    ],
)
def test_precedence(make: ModuleType, topic: str, plan: str | None, region: str | None, queue: str) -> None:
    assert make.route(make.Case(topic, plan, region)) == queue


def test_every_precedence_is_put_to_the_test_in_both_splits(make: ModuleType) -> None:
    """Where two rules meet, both splits hold several tickets."""
    for split, few in (("train", 20), ("heldout", 5)):
        cases = [ticket.case for ticket in make.tickets(split)]
        assert sum(case.topic == "injury" and case.plan == "Orchid" for case in cases) >= few
        assert sum(case.topic == "injury" and case.region == "Nordics" for case in cases) >= few
        assert sum(case.topic != "injury" and case.plan == "Orchid" and case.region == "Nordics" for case in cases) >= few
        assert sum(case.plan not in (None, "Orchid") and case.region == "Nordics" for case in cases) >= few


def test_text_says_the_case_that_routes_it(make: ModuleType) -> None:
    """Plan and region reach the words: a named plan is in the text, and a Nordic billing ticket names a Nordic place."""
    for split in ("train", "heldout"):
        places = make.PHRASES[split]["places"]
        for ticket in make.tickets(split):
            if ticket.case.plan:
                assert ticket.case.plan in ticket.text
            if ticket.case.region:
                assert any(name.split()[-1] in ticket.text for name in (ticket.case.region, *places[ticket.case.region]))


def test_one_word_does_not_decide(make: ModuleType) -> None:
    """Orchid and Nordic places also stand in tickets that go elsewhere: a friend's plan, an old home, an injury."""
    tickets = make.tickets("heldout")
    nordic = (make.NORDICS, *make.PHRASES["heldout"]["places"][make.NORDICS])
    assert sum("Orchid" in ticket.text and ticket.queue != make.CONCIERGE for ticket in tickets) >= 10
    assert sum(any(name in ticket.text for name in nordic) and ticket.queue != make.PARTNER for ticket in tickets) >= 10
