"""Lineage: the chain back to every input, through earlier trainings; and no byte of it can be changed unseen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import lineage_page, model_registry, promotion
from pipelines.artifacts import Artifact, Store, describe_files, sealed
from pipelines.cleanup import clean
from pipelines.cli import main
from pipelines.lineage import Chain, trace_back
from pipelines.stage import Metrics, Stage, Work
from pipelines.trace import told
from pipelines.verify import verify
from tests.unit.pipelines.registry import RECIPE
from xtuner_core.digest import sha256
from xtuner_core.durable import json_bytes
from xtuner_core.errors import RecipeError

NODES: Mapping[str, Mapping[str, str]] = {
    "base": {},
    "prepare": {"base": "base"},
    "train": {"base": "base", "data": "prepare"},
    "convert": {"base": "base", "checkpoint": "train", "data": "prepare"},
    "eval": {"model": "convert"},
    "verdict": {"model": "convert", "tuned": "eval"},
    "chat": {"model": "convert"},
}


def run(store: Store, data: Path, week: int, start: Path | None = None) -> dict[str, Artifact]:
    """A week's run: stages that write a few bytes, with the inputs that real ones have."""
    made: dict[str, Artifact] = {}
    for node, inputs in NODES.items():
        files = {"prepare": [data], "train": [start / "checkpoint.json"] if start else []}.get(node, [])
        stage = Stage(node, 1, _write, lambda recipe: {"seed": 7, "week": week}, lambda recipe, files=files: files, ("numpy",))
        own = replace(stage, run=lambda recipe, work, node=node: _write(recipe, work, f"{node} {week}"))
        made[node] = store.produce(own, RECIPE, {name: made[source] for name, source in inputs.items()}, print).artifact
    return made


def _write(recipe: Any, work: Work, text: str = "") -> Metrics:
    for place in ("model", "checkpoint"):
        (work.payload / place).mkdir()
    (work.payload / "model" / "weights.bin").write_text(text)
    (work.payload / "checkpoint" / "checkpoint.json").write_text(json.dumps({"of": text}))
    (work.record / "log.txt").write_text(f"log of {text}")
    return {"sources": [{"split": "train"}], "text": text}


def built(place: Path) -> Store:
    """Two weeks, the second going on from the first; tickets@1 and tickets@2, which is in production."""
    store, start = Store(place / "store"), None
    for week in (1, 2):
        data = place / f"week{week}.jsonl"
        data.write_text(f"week {week}\n")
        made = run(store, data, week, start)
        start = made["train"].payload / "checkpoint"
        promotion.promote(store, promotion.register(store, RECIPE, made, True, "", {"tuned": {"chats": 1.5}}), "Ada", "better")
    return store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built(tmp_path_factory.mktemp("lineage"))


@pytest.fixture
def store(original: Store, tmp_path: Path) -> Store:
    """A copy of it to damage; its input files are the original's."""
    return Store(shutil.copytree(original.root, tmp_path / "store", symlinks=True))


def nodes(chain: Chain) -> list[tuple[str, str]]:
    return [(step.node, step.manifest["metrics"]["text"]) for step in chain.steps]


def broken(store: Store, model: str = "tickets") -> list[str]:
    return [f"{one.where}: {one.what}" for _, findings in verify(trace_back(store, model)) for one in findings if one.broken]


def first_broken(store: Store) -> str:
    findings = (one for _, found in verify(trace_back(store, "tickets")) for one in found if one.broken)
    return next((one.where for one in findings), "none")


def notes(store: Store) -> list[str]:
    return [f"{one.where}: {one.what}" for _, findings in verify(trace_back(store, "tickets")) for one in findings if not one.broken]


# The chain --------------------------------------------------------------------------------------------------------------------------


def test_a_version_s_chain_goes_through_the_training_it_went_on_from(store: Store) -> None:
    chain = trace_back(store, "tickets")
    earlier = ["base", "prepare", "train"]
    assert sorted(nodes(chain)) == sorted([(node, f"{node} 2") for node in NODES] + [(node, f"{node} 1") for node in earlier])
    places = {step.id: number for number, step in enumerate(chain.steps)}
    assert all(places[source] < places[step.id] for step in chain.steps for source in step.inputs.values())
    assert [step.node for step in chain.ancestors()].count("train") == 2
    assert "verdict" not in [step.node for step in chain.ancestors()]


@pytest.mark.parametrize("place", ["", "payload", "payload/model", "payload/model/weights.bin"])
def test_a_path_into_an_artifact_is_its_model_whatever_the_store_given(store: Store, tmp_path: Path, place: str) -> None:
    version = model_registry.find(store, "tickets@1")
    folder = store.root / "convert" / version.artifacts["convert"]["key"] / place
    chain = trace_back(Store(tmp_path / "other"), str(folder))
    assert nodes(chain) == [(node, f"{node} 1") for node in ("base", "prepare", "train", "convert")]


def test_a_path_in_the_registry_is_its_version(store: Store) -> None:
    for place in ("production", "versions/0002"):
        chain = trace_back(Store(Path("elsewhere")), str(store.root / "models/tickets" / place))
        assert chain.version == model_registry.find(store, "tickets@2")


@pytest.mark.parametrize("model", ["nosuch", "nosuch@1", "tickets@9", "/etc", "../.."])
def test_what_is_no_model_is_told(store: Store, model: str) -> None:
    with pytest.raises(RecipeError):
        trace_back(store, model)


def test_the_text_is_complete(store: Store, original: Store) -> None:
    text = "\n".join(lineage_page.as_text(trace_back(store, "tickets")))
    chain = trace_back(store, "tickets")
    assert text.startswith("tickets@2: ")
    data = original.root.with_name("week1.jsonl")
    assert f"file       {data}\n             sha256 {sha256(data)}" in text
    assert all(step.id in text and step.reference["payload_digest"] in text for step in chain.steps)
    assert text.count("seed       7") == len(chain.steps)
    assert "numpy " in text and "torch " in text and "by stage version 1, code " in text


def test_the_json_holds_settings_files_and_metrics(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", "tickets@2", "--json", "--store", str(store.root)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["version"]["number"]) == ("tickets@2", 2)
    train = next(step for step in told["steps"] if step["node"] == "train" and step["metrics"]["text"] == "train 2")
    assert train["ingredients"]["settings"] == {"seed": 7, "week": 2}
    assert set(train["inputs"]) == {"base", "data", "earlier train"}
    assert train["environment"]["code"]


def test_the_graph_has_every_step_and_no_name_can_break_it(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = tmp_path / ('a"]--> x;<script>%%.jsonl')
    hostile.write_text("three\n")
    promotion.register(store, RECIPE, run(store, hostile, 3), True, "", {})
    assert main(["lineage", "tickets@3", "--mermaid", "--store", str(store.root)]) == 0
    graph = capsys.readouterr().out
    assert graph.startswith("graph LR\n")
    assert all(step.reference["key"] in graph for step in trace_back(store, "tickets@3").steps)
    assert "<script>" not in graph and "#34;#93;--#62;" in graph


# Verify -----------------------------------------------------------------------------------------------------------------------------


def test_an_untouched_chain_is_whole_wherever_the_store_lies(store: Store, tmp_path: Path) -> None:
    assert broken(store) == notes(store) == []
    store.root.rename(tmp_path / "moved")
    assert broken(Store(tmp_path / "moved")) == notes(Store(tmp_path / "moved")) == []
    assert len(trace_back(Store(tmp_path / "moved"), "tickets").steps) == 10


def _tampers(file: Path) -> dict[str, bytes]:
    """Other contents for a file: a bit of each of some bytes, cut, longer; of JSON every value changed and every field left out."""
    content = file.read_bytes()
    places = {0, len(content) // 2, len(content) - 1}
    flips = {f"bit of byte {at}": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places}
    others = {"cut": content[:-1], "longer": content + b"\n", "empty": b""}
    edits = {}
    if file.suffix == ".json":
        value = json.loads(content)
        for name in value:
            edits[f"without {name}"] = json_bytes({key: part for key, part in value.items() if key != name})
            edits[f"other {name}"] = json_bytes(value | {name: "other"})
    return {what: changed for what, changed in (flips | others | edits).items() if changed != content}


def test_no_change_of_any_file_of_the_chain_goes_unseen(store: Store) -> None:
    """Every file of every artifact of the chain; stamps.json and `used` only remember times, and decide nothing here."""
    checked = 0
    for step in trace_back(store, "tickets").steps:
        assert step.path
        for file in sorted(path for path in step.path.rglob("*") if path.is_file() and path.name not in ("stamps.json", "used")):
            content, status = file.read_bytes(), file.stat()
            for what, changed in _tampers(file).items():
                file.write_bytes(changed)
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
                assert first_broken(store).startswith(str(step.path)), f"{what} of {file}"
                checked += 1
            file.unlink()
            assert first_broken(store).startswith(str(step.path)), f"no {file}"
            file.write_bytes(content)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert broken(store) == []
    assert checked > 300


def _forged(artifact: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A manifest that someone edited who knows how it is sealed."""
    file = artifact / "manifest.json"
    file.write_bytes(json_bytes(sealed(change(json.loads(file.read_text())))))


def test_a_forged_artifact_is_found_by_what_was_made_of_it(store: Store) -> None:
    folder = next(step.path for step in trace_back(store, "tickets").steps if step.manifest["metrics"]["text"] == "prepare 2")
    assert folder
    (folder / "payload/model/weights.bin").write_text("poisoned")
    _forged(folder, lambda manifest: manifest | describe_files(folder))
    assert "its payload is" in broken(store)[0]
    assert str(folder) in broken(store)[0]


def _other_file(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"input_files": [{**manifest["input_files"][0], "sha256": "0" * 64}]}


def _other_input(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"inputs": {"base": {**manifest["inputs"]["base"], "payload_digest": "0" * 64}}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_file, "its input files are not those"),
        (_other_input, "its inputs are not those"),
        (lambda manifest: manifest | {"stage": "convert"}, "it is of stage"),
    ],
    ids=["file", "input", "stage"],
)
def test_a_forged_manifest_contradicts_its_key(store: Store, change: Callable[[dict[str, Any]], dict[str, Any]], told: str) -> None:
    folder = next(step.path for step in trace_back(store, "tickets").steps if step.manifest["metrics"]["text"] == "prepare 1")
    assert folder
    _forged(folder, change)
    assert any(told in one for one in broken(store))


def test_input_files_that_are_gone_or_changed_are_told_and_are_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, data = built(tmp_path), tmp_path / "week1.jsonl"
    data.write_text("another\n")
    data.with_name("week2.jsonl").unlink()
    assert main(["verify", "tickets", "--store", str(store.root)]) == 0
    told = capsys.readouterr().out
    assert f"{data}: has changed since prepare read it" in told
    assert "week2.jsonl: is not there any more" in told
    assert "tickets is what its manifests say" in told


def test_the_command_names_the_first_broken_link_and_ends_with_65(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = (trace_back(store, "tickets").steps[place].path for place in (1, -1))
    assert first and last
    for folder in (last, first):
        (folder / "record/log.txt").write_text("edited")
    assert main(["verify", "tickets", "--store", str(store.root)]) == 65
    told = capsys.readouterr()
    assert f"error: the chain of tickets breaks first at {first}: record/log.txt: " in told.err
    assert "(2 in all)" in told.err
    assert told.out.count("✗") == 2


def test_what_is_gone_breaks_the_chain_unless_the_same_bytes_are_there(store: Store) -> None:
    base = trace_back(store, "tickets@1").steps[0]
    assert base.path
    again = replace(Stage("base", 2, lambda recipe, work: _write(recipe, work, "base 1"), lambda recipe: {}))
    store.produce(again, RECIPE, {}, print)
    shutil.rmtree(base.path)
    assert broken(store, "tickets@1") == []
    shutil.rmtree(store.root / "base")
    assert broken(store, "tickets@1")[0] == f"{base.id}: is gone"


def test_the_chain_goes_on_through_a_run_that_was_cleaned_up(store: Store, original: Store) -> None:
    week_1, week_3 = original.root.with_name("week1.jsonl"), store.root.with_name("week3.jsonl")
    week_3.write_text("week 3\n")
    made = run(store, week_3, 3, model_registry.checkpoint(store, model_registry.find(store, "tickets@2")))
    promotion.promote(store, promotion.register(store, RECIPE, made, True, "", {}), "Ada", "better")
    whole = trace_back(store, "tickets")
    del made
    clean(store, 0, None, print)
    chain = trace_back(store, "tickets")
    assert nodes(chain) == nodes(whole) and [step.node for step in chain.steps if step.path is None] == ["base", "prepare", "train"]
    assert broken(store) == [] and broken(store, "tickets@2") == []
    assert sum("was cleaned up; its manifest was kept" in line for line in notes(store)) == 3
    assert any("is gone, only its manifest was kept" in line for line in broken(store, "tickets@1"))
    assert [version and version.number for version in ancestry(store, "tickets@3")] == [2, 1]
    assert "this training read the file; prepare/" in "\n".join(told(chain, f"{week_1}:1"))
    kept = next((store.root / ".removed").glob("prepare-*.json"))
    kept.write_text(kept.read_text().replace("week1", "week9"))
    assert broken(store) == [f"prepare/{kept.stem.rpartition('-')[2]}: is gone"]
    assert "what it read cannot be told" in "\n".join(told(trace_back(store, "tickets"), f"{week_1}:1"))


def ancestry(store: Store, title: str) -> Iterator[model_registry.Version]:
    version = model_registry.went_on_from(store, model_registry.find(store, title))
    while version:
        yield version
        version = model_registry.went_on_from(store, version)
