"""The data report: its figures are those of the data, and nothing in the data becomes part of the page's markup."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import prepare
from pipelines.data_report import general
from pipelines.preview import Sample, Span, visible
from pipelines.recipe import load_recipe
from pipelines.report_page import page
from pipelines.stage import Work
from xtuner_core.data.statistics import histogram, length_bins

EVIL = "<script>alert('&')</script>"
LONG = (
    "The battery of my cargo bike does not charge any more although the lamp at the charger is green and I tried three sockets in two "
    "different houses since last Sunday, and the shop in the main street says that it is not their fault at all"
)


def chat(question: str, answer: str, role: str = "assistant") -> str:
    return json.dumps([{"role": "user", "content": question}, {"role": role, "content": answer}])


class Reader(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, set[str]] = {}
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.fixture
def reported(tmp_path: Path, prepare_place: Callable[[], Work]) -> Callable[..., tuple[dict[str, Any], Work]]:
    """Name and lines of a training file, lines of the held-out file, overrides → report.json and where all of it is."""

    def make(lines: list[str], heldout: list[str], *overrides: str, name: str = "train.jsonl") -> tuple[dict[str, Any], Work]:
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (tmp_path / "heldout.jsonl").write_text("\n".join(heldout) + "\n", encoding="utf-8")
        dataset = {"name": "held", "path": str(tmp_path / "heldout.jsonl")}
        fields = [f"data.train={json.dumps([str(tmp_path / name)])}", f"eval.datasets={json.dumps([dataset])}", *overrides]
        work = prepare_place()
        prepare.run(load_recipe("qwen3_tiny_full_openai", fields), work)
        return json.loads((work.record / "report.json").read_text()), work

    return make


Reported = Callable[..., tuple[dict[str, Any], Work]]


def test_every_finding_names_file_and_line(reported: Reported, tmp_path: Path) -> None:
    lines = [
        chat("What do bees make?", "Honey."),
        "",
        chat("Say something kind.", "You are welcome here."),
        chat("What do bees make?", "Honey."),
        chat("x", "y", role="wizard"),
        chat("x", "y", role="witch"),
        "{",
        chat(LONG, "Oh."),
        chat(LONG + "!", "Oh."),
    ]
    heldout = [chat("Nobody asks this, ever?", "Right."), chat("Say something kind.", "No.")]
    report, work = reported(lines, heldout, "data.max_rejected=0.5", f"chat.prompts={tmp_path / 'none.jsonl'}")
    at = f"{tmp_path}/train.jsonl"
    [file] = report["files"]
    counts = {"lines": 9, "accepted": 5, "rejected": 3, "blank": 1, "dropped": 0, "kept": 0, "documents": 5, "share": 1.0}
    assert {name: file[name] for name in counts} == counts
    assert (file["file"], file["format"], file["split"]) == (at, "openai", "train")
    assert file["tokens"] == report["tokens"] == report["splits"]["training"]["tokens"]
    assert [(group["lines"], [one["place"] for one in group["examples"]]) for group in report["rejects"]] == [
        (2, [f"{at}:5", f"{at}:6"]),
        (1, [f"{at}:7"]),
    ]
    duplicates = report["duplicates"]
    assert duplicates["exact"] == {"documents": 1, "across": 0, "examples": [{"first": f"{at}:1", "copy": f"{at}:4"}]}
    assert duplicates["near"]["documents"] == 1
    [near] = duplicates["near"]["examples"]
    assert (near["first"], near["copy"], near["similarity"] >= 0.8) == (f"{at}:8", f"{at}:9", True)
    held, missing = report["leakage"]
    assert (held["questions"], held["whole"], held["overlap"], held["used_for"]) == (2, 1, 0, ["eval held"])
    expected = {"question": f"{tmp_path}/heldout.jsonl:2", "document": f"{at}:3", "whole": True, "text": "Say something kind."}
    assert held["examples"] == [expected]
    assert "none.jsonl" in missing["problem"]
    assert report["without_loss"] == {"documents": 0, "examples": []}
    shown = Reader((work.record / "report.html").read_text(encoding="utf-8")).shown
    assert "9 lines = 5 accepted + 3 rejected + 1 blank + 0 dropped" in shown
    assert "held-out questions in the data as a whole: 1" in shown
    assert (work.record / "preview.txt").read_text(encoding="utf-8").count("<|im_end|>⟧") == 3


def test_the_demo_s_held_out_tickets_are_not_in_its_training_data(smollm2_folder: Path, tmp_path: Path) -> None:
    parts = {part: tmp_path / part for part in ("payload", "record", "scratch", "cache")}
    for part in parts.values():
        part.mkdir()
    recipe = load_recipe("smollm2_135m_instruct_lora_tickets_e3")
    prepare.run(recipe, Work({"base": smollm2_folder.parent}, **parts, log=print))
    report = json.loads((tmp_path / "record" / "report.json").read_text())
    assert [(Path(held["file"]).name, held["questions"], held["whole"], held["overlap"]) for held in report["leakage"]] == [
        ("questions.jsonl", 100, 0, 0),
        ("texts.jsonl", 12, 0, 0),
        ("heldout.jsonl", 200, 0, 0),
    ]
    assert report["duplicates"]["exact"]["documents"] == 0


def test_questions_of_other_kinds_are_searched_for_too(reported: Reported, tmp_path: Path) -> None:
    (tmp_path / "choices.jsonl").write_text('{"question": "Who hid the silver key?", "A": "A cat", "B": "A thief", "answer": "A"}\n')
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    sets = [f"{{name: {kind}, kind: {kind}, path: {tmp_path / name}.jsonl}}" for kind, name in (("choice", "choices"), ("loss", "texts"))]
    lines = [chat("Who hid the silver key?", "I do not know."), chat(LONG, "Oh.")]
    report, _ = reported(lines, [chat("Who is it?", "Me.")], f"eval.datasets=[{', '.join(sets)}]")
    choices, texts, prompts = report["leakage"]
    assert [(held["used_for"], held["questions"], held["whole"]) for held in (choices, texts, prompts)] == [
        (["eval choice"], 1, 1),
        (["eval loss"], 1, 1),
        (["chat"], 16, 0),
    ]
    assert choices["examples"][0]["question"].endswith("choices.jsonl:1")


def test_copies_on_both_sides_of_the_split_are_told(reported: Reported, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text(chat("Say something kind.", "No.") + "\n" + chat(LONG + "!", "Oh.") + "\n")
    lines = [chat(LONG, "Oh."), chat("Say something kind.", "No."), chat("Unlike all others", "Yes.")]
    report, _ = reported(lines, [chat("Who is it?", "Me.")], f"data.validation={tmp_path / 'validation.jsonl'}")
    assert {name: split["documents"] for name, split in report["splits"].items()} == {"not used": 0, "training": 3, "validation": 2}
    assert (report["duplicates"]["exact"]["across"], report["duplicates"]["near"]["across"]) == (1, 1)


def test_nothing_from_the_data_becomes_markup(reported: Reported) -> None:
    lines = [chat(EVIL, EVIL), chat(EVIL, EVIL), chat(EVIL, "x", role=EVIL)]
    clean, clean_work = reported(
        [chat("q", "a"), chat("q", "a"), chat("q", "x", role="w")], [chat("Hello there!", "a")], "data.max_rejected=0.5"
    )
    _, work = reported(lines, [chat(EVIL, EVIL)], "data.max_rejected=0.5", name="<img src=x onerror=alert(1)>&amp;.jsonl")
    text = (work.record / "report.html").read_text(encoding="utf-8")
    evil, good = Reader(text), Reader((clean_work.record / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "a", "link", "iframe", "object"} & set(evil.tags)
    assert set(evil.tags) == set(good.tags) and set(evil.attributes) == set(good.attributes)
    assert evil.attributes["class"] == good.attributes["class"]
    assert evil.shown.count(EVIL) >= 6
    assert "<img src=x onerror=alert(1)>&amp;.jsonl:3" in evil.shown
    assert "http" not in text.replace("http-equiv", "")
    assert clean["rejects"][0]["lines"] == 1


def minimal(**changes: Any) -> dict[str, Any]:
    """A report without a finding."""
    kind = {"documents": 0, "across": 0, "examples": []}
    lengths = {"least": 0, "p5": 0, "median": 0, "p95": 0, "longest": 0, "max_length": 8, "pack_length": 8, "edges": [1, 2, 3, 4]}
    packing = {"packing": "best_fit", "packs": 0, "pack_efficiency": 0.0, "pack_cost_mean": 0.0, "pack_cost_max": 0}
    empty = {"recipe": "r", "files": [], "rejects": [], "leakage": [], "splits": {}, "without_loss": {"documents": 0, "examples": []}}
    duplicates = {"exact": kind, "near": {**kind, "complete": True}}
    return {
        **empty, "lengths": {**lengths, "documents": [0, 0, 0]}, "packing": packing, "duplicates": duplicates, **changes
    }  # fmt: skip


def page_full_of(text: str) -> Reader:
    """A page on which everything that comes from data or paths is this text."""
    rejects = [{"reason": text, "lines": 2, "examples": [{"place": text, "reason": text}]}]
    leak = {"question": text, "document": text, "whole": True, "text": text}
    held = {"file": text, "used_for": [text], "sha256": None, "questions": 1, "whole": 1, "overlap": 0, "examples": [leak]}
    unread = {"file": text, "used_for": [text], "problem": text}
    spans = (Span(text, True, False), Span(text, True, True), Span(text, False, False))
    return Reader(page(minimal(recipe=text, rejects=rejects, leakage=[held, unread]), [Sample(text, spans)]))


@given(text=st.text())
def test_any_text_is_shown_as_it_is(text: str) -> None:
    plain, shown = page_full_of("plain"), page_full_of(text)
    assert (shown.tags, shown.attributes) == (plain.tags, plain.attributes)
    assert shown.shown == plain.shown.replace("plain", visible(text))


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    import numpy as np

    edges = length_bins(max(lengths))
    assert all(low < high <= 2 * low for low, high in itertools.pairwise(edges))
    assert sum(histogram(np.array(lengths), edges)) == len(lengths)
    counts = histogram(np.array(lengths), edges)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == sum(low <= length < high for length in lengths)


def test_data_that_is_only_kept_for_later_has_a_report_too(reported: Reported) -> None:
    prompt = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "sums"}
    report, work = reported([json.dumps(prompt)] * 3, [chat("Hello there!", "a")])
    assert (report["kept"], report["packing"]["packs"], report["duplicates"]["exact"]["documents"]) == (3, 0, 0)
    assert "3 are preference pairs or prompts" in Reader((work.record / "report.html").read_text(encoding="utf-8")).shown


def test_reasons_are_grouped_by_what_does_not_differ() -> None:
    assert general("message 12: unknown role 'wiz ard'; known: user") == "message N: unknown role '…'; known: user"
    assert general('key "a" appears twice, 2048 tokens') == "key '…' appears twice, N tokens"
