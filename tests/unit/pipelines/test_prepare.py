"""The prepare stage: which files it reads and how, what it refuses, and what it leaves for training."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from pipelines.runner import run_until
from pipelines.stage import Metrics, Work
from xtuner_core.data import shards
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.errors import DataError, RecipeError

TINY = "qwen3_tiny_full_openai"
Place = Callable[[], Work]


def chats(file: Path, *answers: str) -> Path:
    rows = [json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]) for answer in answers]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def prepared(place: Place, *overrides: str, log: list[str] | None = None) -> tuple[Metrics, Work]:
    work = replace(place(), log=print if log is None else log.append)
    return prepare.run(load_recipe(TINY, overrides), work), work


def trained(work: Work, split: str = "packs") -> Counter[tuple[int, ...]]:
    """The documents of a split by their ids, each as often as an epoch has it."""
    dataset = PackedDataset(work.payload, split)
    return Counter(tuple(piece.ids.tolist()) for pack in range(len(dataset)) for piece in dataset.pieces(pack))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# Inputs -----------------------------------------------------------------------------------------------------------------------------


def test_sources_keep_their_order_and_their_own_format(prepare_place: Place, tmp_path: Path) -> None:
    one, two = chats(tmp_path / "z.jsonl", "a"), tmp_path / "a.jsonl"
    two.write_text(json.dumps({"instruction": "q", "output": "b"}) + "\n")
    log: list[str] = []
    metrics, _ = prepared(prepare_place, f"data.train=[{{path: {one}, format: openai}}, {two}]", log=log)
    assert [(row["file"], row["format"], row["accepted"]) for row in metrics["sources"]] == [
        (str(one), "openai", 1),
        (str(two), "alpaca", 1),
    ]
    assert metrics["sources"][0]["reason"] == "the recipe says so" and "instruction" in metrics["sources"][1]["reason"]
    assert any(re.match(r"format alpaca: a\.jsonl \(.*instruction", line) for line in log)


def test_a_file_named_twice_alike_is_read_once(prepare_place: Place, tmp_path: Path) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    metrics, _ = prepared(prepare_place, f"data.train=[{file}, {tmp_path}]")
    assert metrics["documents"] == 1


@pytest.mark.parametrize("second", ["data.train=[{path: FILE, sample_ratio: 2}, FILE]", "data.validation=[FILE]"])
def test_a_file_named_twice_and_differently_is_refused(prepare_place: Place, tmp_path: Path, second: str) -> None:
    file = chats(tmp_path / "one.jsonl", "a", "b")
    with pytest.raises(RecipeError, match=r"one\.jsonl: named twice"):
        prepared(prepare_place, f"data.train={file}", second.replace("FILE", str(file)))


# Accounting -------------------------------------------------------------------------------------------------------------------------


def test_all_rejects_are_listed_and_the_first_twenty_told(prepare_place: Place, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(chats(tmp_path / "good.jsonl", "a").read_text() + "rubbish\n" * 30)
    work = prepare_place()
    with pytest.raises(DataError) as error:
        prepare.run(load_recipe(TINY, [f"data.train=[{file}]"]), work)
    told = str(error.value)
    assert "30 of 31 lines rejected (96.77%)" in told and "… and 10 more" in told and told.count("bad.jsonl:") == 20
    assert "data.max_rejected=0.968" in told
    rows = [json.loads(line) for line in (work.record / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [(str(file), number) for number in range(2, 32)]


def test_dropped_lines_are_counted_and_never_rejected(prepare_place: Place, tmp_path: Path) -> None:
    file = chats(tmp_path / "long.jsonl", "fits", "x" * 500, "fits too")
    log: list[str] = []
    metrics, work = prepared(prepare_place, f"data.train={file}", "data.max_length=64", "data.too_long=drop", log=log)
    assert (metrics["lines"], metrics["accepted"], metrics["dropped"], metrics["rejected"]) == (3, 2, 1, 0)
    assert "1 dropped" in log[-1]
    assert (work.record / "rejected.jsonl").read_text() == ""


def test_if_all_is_dropped_the_message_says_why(prepare_place: Place, tmp_path: Path) -> None:
    file = chats(tmp_path / "long.jsonl", "x" * 500)
    with pytest.raises(DataError, match=r"nothing to train on.*1 were dropped.*data\.too_long"):
        prepared(prepare_place, f"data.train={file}", "data.max_length=64", "data.too_long=drop")


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    file = tmp_path / "preferences.jsonl"
    rows = [{"prompt": "q", "chosen": f"good {number}", "rejected": "bad"} for number in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_preferences_alone_are_kept_and_it_is_said(prepare_place: Place, preferences: Path) -> None:
    log: list[str] = []
    metrics, work = prepared(prepare_place, f"data.train={preferences}", log=log)
    assert (metrics["accepted"], metrics["kept"], metrics["documents"], metrics["packs"]) == (3, 3, 0, 0)
    assert "nothing in them can be trained on: 3 preference pairs and prompts are kept" in log[-1]
    kept = [json.loads(line) for line in (work.payload / "kept.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"] for row in kept] == ["good 0", "good 1", "good 2"]
    assert len(PackedDataset(work.payload)) == 0


def test_preferences_beside_conversations_are_kept_too(prepare_place: Place, preferences: Path, tmp_path: Path) -> None:
    metrics, work = prepared(prepare_place, f"data.train=[{chats(tmp_path / 'chat.jsonl', 'a')}, {preferences}]")
    assert (metrics["accepted"], metrics["kept"], metrics["documents"], metrics["packs"]) == (4, 3, 1, 1)
    assert len((work.payload / "kept.jsonl").read_text().splitlines()) == 3


def test_training_refuses_what_is_only_kept(preferences: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no packs to train on.*preference"):
        run_until("train", load_recipe(TINY, [f"data.train={preferences}"]), Store(tmp_path / "store"), print)


# Splits and ratios ------------------------------------------------------------------------------------------------------------------


def test_a_validation_share_is_kept_back_from_training(prepare_place: Place, tmp_path: Path) -> None:
    file = chats(tmp_path / "many.jsonl", *(f"answer {number}" for number in range(200)))
    whole, everything = prepared(prepare_place, f"data.train={file}")
    metrics, work = prepared(prepare_place, f"data.train={file}", "data.validation=0.2")
    assert not (everything.payload / "validation").exists() and "validation_documents" not in whole
    assert trained(work) + trained(work, "validation") == trained(everything)
    assert 20 < sum(trained(work, "validation").values()) == metrics["validation_documents"] < 60
    assert metrics["epoch_tokens"] + metrics["validation_tokens"] == metrics["tokens"] == whole["tokens"]


def test_own_validation_files(prepare_place: Place, tmp_path: Path) -> None:
    train, held = chats(tmp_path / "train.jsonl", "a", "b"), chats(tmp_path / "held.jsonl", "c")
    metrics, work = prepared(prepare_place, f"data.train={train}", f"data.validation=[{held}]")
    assert (sum(trained(work).values()), sum(trained(work, "validation").values())) == (2, 1)
    assert [row["split"] for row in metrics["sources"]] == ["train", "validation"]


def test_validation_files_alone_are_nothing_to_train_on(prepare_place: Place, tmp_path: Path) -> None:
    empty, held = tmp_path / "empty.jsonl", chats(tmp_path / "held.jsonl", "c")
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"nothing to train on: .*empty\.jsonl"):
        prepared(prepare_place, f"data.train=[{{path: {empty}, format: openai}}]", f"data.validation=[{held}]")


def test_a_ratio_repeats_and_halves(prepare_place: Place, tmp_path: Path) -> None:
    twice, half = chats(tmp_path / "twice.jsonl", "a", "b"), chats(tmp_path / "half.jsonl", "c", "d", "e", "f")
    settings = f"data.train=[{{path: {twice}, sample_ratio: 2}}, {{path: {half}, sample_ratio: 0.5}}]"
    metrics, work = prepared(prepare_place, settings)
    assert sorted(trained(work).values()) == [1, 1, 2, 2]
    assert metrics["documents"] == 6
    assert trained(prepared(prepare_place, settings)[1]) == trained(work)


# The artifact -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "soft", "hard", "none"])
def test_every_packing_is_the_same_bytes_again_and_holds_every_token(prepare_place: Place, tmp_path: Path, packing: str) -> None:
    file = chats(tmp_path / "many.jsonl", *("word " * (1 + number % 40) for number in range(1, 60)))
    overrides = (f"data.train={file}", f"data.packing={packing}", "data.pack_length=256", "data.max_length=256", "data.validation=0.1")
    (metrics, one), (_, other) = prepared(prepare_place, *overrides), prepared(prepare_place, *overrides)
    assert files_below(one.payload) == files_below(other.payload)
    tokens = sum(length * times for ids, times in trained(one).items() for length in [len(ids)])
    assert tokens == metrics["epoch_tokens"]
    described = json.loads((one.payload / "data.json").read_text())
    assert (described["packing"], described["pack_length"], described["packs"]) == (packing, 256, metrics["packs"])


def test_the_payload_knows_no_path(prepare_place: Place, tmp_path: Path) -> None:
    _, work = prepared(prepare_place, f"data.train={chats(tmp_path / 'one.jsonl', 'a', 'b')}", "data.validation=0.5")
    assert all(str(tmp_path).encode() not in content for content in files_below(work.payload).values())


def test_samples_are_the_first_conversations_with_their_ids(prepare_place: Place, tmp_path: Path) -> None:
    one, two = chats(tmp_path / "1.jsonl", *"abc"), chats(tmp_path / "2.jsonl", *(f"x{number}" for number in range(100)))
    _, work = prepared(prepare_place, f"data.train=[{one}, {two}]")
    samples = [json.loads(line) for line in (work.payload / "samples.jsonl").read_text().splitlines()]
    assert [sample["messages"][-1]["content"] for sample in samples] == ["a", "b", "c", *(f"x{number}" for number in range(61))]
    assert set(trained(work)) >= {tuple(sample["ids"]) for sample in samples}


def test_the_artifact_survives_the_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    recipe = load_recipe(TINY, [f"data.train={chats(tmp_path / 'one.jsonl', 'a', 'b')}"])
    made = run_until("prepare", recipe, store, print).artifact
    import shutil

    shutil.rmtree(store.cache)
    assert store.find("prepare", made.path.name, full=True) is not None
    assert run_until("prepare", recipe, store, print).cached
    assert not store.cache.exists()


def test_a_change_of_packing_tokenizes_nothing_and_of_length_everything(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    file = chats(tmp_path / "one.jsonl", "a", "b")

    def tokenized(*overrides: str) -> bool:
        told: list[str] = []
        run_until("prepare", load_recipe(TINY, [f"data.train={file}", *overrides]), store, told.append)
        return any("tokenized 1 of 1 input files" in line for line in told)

    assert [tokenized(), tokenized("data.pack_length=4096"), tokenized("data.max_length=512")] == [True, False, True]


def settings(*overrides: str) -> Any:
    return prepare.STAGE.settings(load_recipe(TINY, overrides))


@pytest.mark.parametrize("override", ["data.workers=7", "data.runner=dask", "train.epochs=9"])
def test_who_does_the_work_is_not_in_the_key(override: str) -> None:
    assert settings(override) == settings()


@pytest.mark.parametrize(
    "override",
    ["data.pack_length=4096", "data.max_length=99", "data.packing=hard", "data.order=length_grouped", "data.loss=last",
     "data.thinking=drop", "data.too_long=drop", "data.validation=0.1", "data.max_rejected=0.1", "seed=9", "model.template=chatml",
     "data.format=openai"],
)  # fmt: skip
def test_what_decides_bytes_is_in_the_key(override: str) -> None:
    assert settings(override) != settings()


def test_a_kind_a_ratio_and_a_split_are_in_the_key_and_a_place_is_not(tmp_path: Path) -> None:
    one, copy, other = tmp_path / "one.jsonl", tmp_path / "copy.jsonl", tmp_path / "one.json"
    for file in (one, copy, other):
        chats(file, "a")
    plain = settings(f"data.train={one}")
    assert settings(f"data.train={copy}") == plain
    assert settings(f"data.train={other}") != plain
    assert settings(f"data.train={{path: {one}, sample_ratio: 2}}") != plain
    assert settings(f"data.train={one}", f"data.validation=[{copy}]") != settings(f"data.train=[{one},{copy}]")


def test_missing_lines_are_never_overlooked(prepare_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tally that does not add up is a bug, and must not become an artifact."""
    real = shards.read_tally
    monkeypatch.setattr(shards, "read_tally", lambda cache, job: replace(real(cache, job), lines=5))
    with pytest.raises(AssertionError, match="do not add up"):
        prepared(prepare_place, f"data.train={chats(tmp_path / 'one.jsonl', 'a')}")
