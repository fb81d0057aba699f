"""The registry: what a version is, which one is in use, and that its history tells all of it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines import model_registry, promotion
from pipelines.artifacts import Store
from pipelines.model_registry import Version
from pipelines.recipe import load_recipe
from pipelines.served_model import named_model
from pipelines.stage import Stage
from tests.unit.pipelines.registry import RECIPE, in_use, registered, result
from xtuner_core.errors import DataError, RecipeError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def told(store: Store) -> list[tuple[int, str]]:
    return [(entry.version, entry.what) for entry in model_registry.history(store, "tickets")]


def states(store: Store) -> list[str]:
    return [model_registry.status(store, version) for version in model_registry.versions(store, "tickets")]


def promote(store: Store, version: Version) -> bool:
    return promotion.promote(store, version, "Ada", "better")


# Versions ---------------------------------------------------------------------------------------------------------------------------


def test_a_result_becomes_a_version_once(store: Store) -> None:
    first, again, second = registered(store, "one"), registered(store, "one"), registered(store, "two")
    assert (first, first.title, second.title) == (again, "tickets@1", "tickets@2")
    assert model_registry.names(store) == ["tickets"]
    assert model_registry.versions(store, "tickets") == [first, second]
    assert (model_registry.folder(store, second) / "model" / "weights").read_text() == "convert of two"
    assert told(store) == [(1, "registered"), (2, "registered")]


def test_the_same_bytes_judged_otherwise_are_another_version(store: Store) -> None:
    made = result(store, "one")
    first = promotion.register(store, RECIPE, made, False, "the chat test failed", {})
    second = promotion.register(store, RECIPE, made | {"chat": result(store, "two")["chat"]}, True, "", {})
    assert [first.number, second.number] == [1, 2]
    assert states(store) == ["rejected", "candidate"]


def test_a_name_finds_the_version_in_use_else_the_newest(store: Store) -> None:
    first, second = registered(store, "one"), registered(store, "two")
    assert model_registry.find(store, "tickets") == second
    with pytest.raises(RecipeError, match="no version of tickets is in production"):
        model_registry.find(store, "tickets@production")
    promote(store, first)
    assert model_registry.find(store, "tickets") == model_registry.find(store, "tickets@production") == first
    assert (named_model("tickets@production", store.root) / "weights").read_text() == "convert of one"
    assert named_model("some/folder", store.root) == Path("some/folder")
    assert model_registry.find(store, "tickets@2") == model_registry.find(store, "tickets@0002") == second


@pytest.mark.parametrize("text", ["tickets@3", "tickets@", "tickets@two", "tickets@-1", "tickets@²"])
def test_an_unknown_number_is_answered_with_the_known_ones(store: Store, text: str) -> None:
    registered(store, "one")
    with pytest.raises(RecipeError, match="tickets has the versions 1"):
        model_registry.find(store, text)
    with pytest.raises(RecipeError, match=r"no such model in .*; known: tickets"):
        model_registry.find(store, "orders@1")


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a/b", "", ".hidden", "a\nb", "-rf"])
def test_no_name_leads_out_of_the_registry(store: Store, name: str) -> None:
    for use in (
        lambda: model_registry.find(store, name),
        lambda: model_registry.production(store, name),
        lambda: promotion.rollback(store, name, "Ada", "why"),
    ):
        with pytest.raises(RecipeError, match="is no name of a model"):
            use()
    with pytest.raises(RecipeError):
        load_recipe("qwen3_tiny_full_openai", [f"promotion.model={json.dumps(name)}"])


@pytest.mark.parametrize("damage", [lambda text: text.replace("51.5", "99.5"), lambda text: text[:-9], lambda text: "[]", lambda text: ""])
def test_a_version_s_file_that_was_edited_is_told(store: Store, damage: Callable[[str], str]) -> None:
    file = model_registry.folder(store, registered(store, "one")) / "version.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(DataError, match=r"versions/0001/version\.json"):
        model_registry.find(store, "tickets@1")


# Production -------------------------------------------------------------------------------------------------------------------------


def test_promote_and_roll_back_step_by_step(store: Store) -> None:
    assert model_registry.production(store, "tickets") is None
    first, second, third = (registered(store, weights) for weights in ("one", "two", "three"))
    assert [promote(store, version) for version in (first, second, second, third)] == [True, True, False, True]
    assert (in_use(store), states(store)) == ("convert of three", ["retired", "retired", "production"])
    assert promotion.rollback(store, "tickets", "Ada", "rude answers") == second
    assert (in_use(store), states(store)) == ("convert of two", ["retired", "production", "retired"])
    assert promotion.rollback(store, "tickets", "Ada", "still") == first
    with pytest.raises(RecipeError, match="no version was in production before"):
        promotion.rollback(store, "tickets", "Ada", "again")
    assert model_registry.production(store, "tickets") == first
    last = model_registry.history(store, "tickets")[-1]
    assert (last.version, last.what, last.by, last.why) == (1, "rolled back", "Ada", "still")
    assert promote(store, third)
    assert promotion.rollback(store, "tickets", "Ada", "no") == first


def test_what_a_person_took_out_is_not_put_back_by_the_next_run(store: Store) -> None:
    gated = load_recipe("qwen3_tiny_full_openai", ["promotion.when=gate"])
    first, second = registered(store, "one"), registered(store, "two")
    assert promotion.decide(gated, first, model_registry.status(store, first)) == "promote"
    promote(store, first)
    promote(store, second)
    promotion.rollback(store, "tickets", "Ada", "rude")
    assert promotion.decide(gated, second, model_registry.status(store, second)) == "keep"


def test_what_the_recipe_wants(store: Store) -> None:
    good, bad = registered(store, "one"), registered(store, "two", gate=False)
    wanted = {when: load_recipe("qwen3_tiny_full_openai", [f"promotion.when={when}"]) for when in ("never", "gate", "approval")}
    assert {when: promotion.decide(recipe, good, "candidate") for when, recipe in wanted.items()} == {
        "never": "keep",
        "gate": "promote",
        "approval": "ask",
    }
    assert {promotion.decide(recipe, bad, "rejected") for recipe in wanted.values()} == {"reject"}
    assert {promotion.decide(recipe, bad, "production") for recipe in wanted.values()} == {"keep"}, "a person wanted it all the same"
    promotion.reject(store, good, "Ada", "off topic")
    promotion.reject(store, good, "Bob", "once more")
    assert states(store) == ["rejected", "rejected"]
    assert told(store)[2:] == [(1, "rejected")]
    assert promotion.decide(wanted["gate"], good, model_registry.status(store, good)) == "keep"


def test_a_comparison_with_a_version_that_is_not_in_use_any_more_is_known(store: Store) -> None:
    plain, asking = (load_recipe("qwen3_tiny_full_openai", [f"eval.production={value}"]) for value in ("data", "registry"))
    first, second, alone = (registered(store, weights) for weights in ("one", "two", "alone"))
    judged = {one.number: judged_against(store, one, f"better than {one.number}") for one in (first, second)}

    def outdated(version: Version) -> bool:
        assert not model_registry.judged_against_another(store, plain, version)
        return model_registry.judged_against_another(store, asking, version)

    assert [outdated(one) for one in (alone, judged[1])] == [False, True], "nothing is in production"
    promote(store, first)
    assert [outdated(one) for one in (alone, judged[1], judged[2])] == [True, False, True]
    assert not promotion.promote(store, judged[2], "gate", "passed", unless=lambda: outdated(judged[2]))
    assert model_registry.production(store, "tickets") == first
    assert promotion.promote(store, judged[1], "gate", "passed", unless=lambda: outdated(judged[1]))
    assert outdated(judged[1]), "the one it was compared with is not in use any more"


def judged_against(store: Store, other: Version, weights: str) -> Version:
    """A version that was compared with another one."""
    files = list((model_registry.folder(store, other) / "model").resolve().iterdir())
    stage = Stage("production", 1, lambda recipe, work: {}, lambda recipe: weights, lambda recipe: files)
    made = result(store, weights) | {"production": store.produce(stage, RECIPE, {}, print).artifact}
    return promotion.register(store, RECIPE, made, True, "", {})


def test_the_version_in_use_cannot_be_rejected(store: Store) -> None:
    promote(store, version := registered(store, "one"))
    with pytest.raises(RecipeError, match="xtuner rollback tickets"):
        promotion.reject(store, version, "Ada", "rude")


def _flip(folder: Path) -> None:
    file = folder / "payload/model/weights"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip, "its bytes changed"),
        (lambda folder: (folder / "payload/model/weights").unlink(), "missing"),
        (lambda folder: (folder / "payload/model/more").write_text(""), "it was added"),
        (shutil.rmtree, "is not in .* any more; run the recipe qwen3_tiny_full_openai"),
    ],
    ids=["a bit", "a file", "one more", "all"],
)
def test_a_damaged_model_goes_into_production_neither_way(store: Store, damage: Callable[[Path], object], reason: str) -> None:
    first, second = registered(store, "one"), registered(store, "two")
    promote(store, first)
    promote(store, second)
    before = told(store)
    damage(store.root / "convert" / first.artifacts["convert"]["key"])
    with pytest.raises(DataError, match=reason):
        promote(store, first)
    with pytest.raises(DataError, match=reason):
        promotion.rollback(store, "tickets", "Ada", "rude")
    assert (in_use(store), told(store)) == ("convert of two", before)


def test_a_version_s_link_that_was_bent_is_not_followed(store: Store) -> None:
    version = registered(store, "one")
    link = model_registry.folder(store, version) / "model"
    link.unlink()
    link.symlink_to(store.root)
    with pytest.raises(DataError, match="restore the link"):
        promote(store, version)


def test_a_store_that_is_moved_keeps_its_models(store: Store, tmp_path: Path) -> None:
    promote(store, registered(store, "one"))
    store.root.rename(tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    assert in_use(moved) == "convert of one"
    promotion.require_whole(moved, model_registry.find(moved, "tickets"))


def test_a_link_that_leads_nowhere_is_not_no_production(store: Store) -> None:
    promote(store, version := registered(store, "one"))
    shutil.rmtree(model_registry.folder(store, version))
    with pytest.raises(DataError, match=r"production/version\.json: cannot be read"):
        model_registry.production(store, "tickets")


# The history ------------------------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_passed_over_and_cut_off(store: Store) -> None:
    version = registered(store, "one")
    file = store.root / "models/tickets/history.jsonl"
    with open(file, "a") as rows:
        rows.write('{"at": "2026-01-01T00:0')
    assert told(store) == [(1, "registered")]
    promote(store, version)
    assert told(store) == [(1, "registered"), (1, "promoted")]
    assert [json.loads(row)["what"] for row in file.read_text().splitlines()] == ["registered", "promoted"]


def test_a_damaged_line_is_told_with_its_number(store: Store) -> None:
    registered(store, "one")
    file = store.root / "models/tickets/history.jsonl"
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"history\.jsonl:2: not a line of the history"):
        model_registry.history(store, "tickets")


def test_side_by_side_nothing_is_lost(store: Store) -> None:
    made = [registered(store, str(number)) for number in range(3)]

    def work(number: int) -> None:
        for _ in range(5):
            registered(Store(store.root), str(number))
            promote(Store(store.root), made[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(model_registry.versions(store, "tickets")) == 3
    promoted = [entry.version for entry in model_registry.history(store, "tickets") if entry.what == "promoted"]
    assert all(one != other for one, other in pairwise(promoted))
    assert model_registry.find(store, "tickets").number == promoted[-1]
