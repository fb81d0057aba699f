"""Suites: what a recipe asks, in order, and mistakes that are told before the first stage."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines import evaluate
from pipelines.chatters import lmdeploy
from pipelines.cli import list_suites
from pipelines.environments import KNOWN, pinned_versions
from pipelines.evaluators import DatasetScore, Sample
from pipelines.pipeline import check
from pipelines.recipe import PROJECT, EvalConfig, load_recipe
from pipelines.stage import Work
from pipelines.suites import chosen, load_suite, shipped_names
from xtuner_core.data.templates import chatml
from xtuner_core.errors import DataError, RecipeError, UserError

TINY = "qwen3_tiny_full_openai"


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_suites_are_whole(name: str) -> None:
    assert load_suite(name).description
    check(load_recipe(TINY, [f"eval.suites=[{name}]"]))


def _suite(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def test_suites_come_first_and_paths_beside_them_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}")
    path = _suite(tmp_path, "datasets: [{name: a, path: mine.jsonl}, {name: b, path: data/tickets/heldout.jsonl, kind: loss}]")
    config = EvalConfig.model_validate({"suites": [path], "datasets": [{"name": "c", "path": "data/tickets/heldout.jsonl"}]})
    assert [(one.dataset.name, one.suite, one.dataset.path) for one in chosen(config)] == [
        ("a", "mine", str(tmp_path / "mine.jsonl")),
        ("b", "mine", str(PROJECT / "data/tickets/heldout.jsonl")),
        ("c", None, str(PROJECT / "data/tickets/heldout.jsonl")),
    ]


@pytest.mark.parametrize(
    ("text", "error", "reason"),
    [
        ("datasets: []", RecipeError, "datasets: Tuple should have at least 1 item"),
        ("", RecipeError, "(whole suite)"),
        ("{", RecipeError, "not readable as YAML"),
        (
            "datasets: [{name: a, kind: riddle, path: data/tickets/heldout.jsonl}]",
            RecipeError,
            "'riddle' is not one of the kinds: choice, ",
        ),
        ("datasets: [{name: a, path: gone.jsonl}]", DataError, "gone.jsonl: no such file"),
        ("datasets: [{name: a}]", RecipeError, "data set a: kind qa needs a path"),
        ("datasets: [{name: chats, path: data/tickets/heldout.jsonl}]", RecipeError, "two data sets are called 'chats'"),
        ("datasets: [{name: a, path: x, size: 3}]", RecipeError, "datasets.0.size"),
        ("datasets: [{name: a, path: data/general}]", DataError, "kind qa needs a file, and this is a folder"),
        (
            "datasets: [{name: a, kind: collection, path: data/general/make.py}]",
            DataError,
            "kind collection needs a folder, and this is a file",
        ),
    ],
)
def test_a_bad_suite_is_told_before_the_first_stage(tmp_path: Path, text: str, error: type[UserError], reason: str) -> None:
    with pytest.raises(error) as caught:
        check(load_recipe(TINY, [f"eval.suites=[{_suite(tmp_path, text)}]"]))
    assert reason in str(caught.value)


def test_an_unknown_suite_lists_the_known_ones_and_nothing_to_ask_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"suite 'nowhere': no such file, and the shipped suites are .*general"):
        check(load_recipe(TINY, ["eval.suites=[nowhere]"]))
    with pytest.raises(RecipeError, match=r"no data set is asked\. Name a suite"):
        check(load_recipe(TINY, ["eval.datasets=[]"]))


def test_the_key_holds_what_decides_the_answers_and_no_path(tmp_path: Path) -> None:
    settings = evaluate.STAGE.settings(load_recipe(TINY, ["eval.suites=[general]"]))
    assert list(settings["versions"]) == ["loss", "opencompass"]
    assert [one["suite"] for one in settings["datasets"]] == ["general", "general", None]
    assert str(PROJECT) not in str(settings)
    assert evaluate.STAGE.settings(load_recipe(TINY, ["eval.suites=[general]", "train.lr=1.0e-4", "eval.timeout=99"])) == settings


def test_a_suite_is_added_by_adding_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _suite(tmp_path, "datasets: [{name: mine, path: data/tickets/heldout.jsonl}]")
    monkeypatch.setattr("pipelines.suites.SHIPPED", tmp_path)
    (dataset,) = load_suite("mine").datasets
    assert dataset.name == "mine"


@pytest.mark.parametrize("engine", ["in-process", "localhost:8000", "ftp://x", "http://", "http://["])
def test_an_engine_that_is_none_is_told(engine: str) -> None:
    with pytest.raises(RecipeError, match=r"eval\.engine: .* is neither in_process, served nor the URL of an OpenAI API"):
        check(load_recipe(TINY, [f"eval.engine={engine}"]))


def test_the_engine_counts_only_for_what_is_asked_of_it() -> None:
    asked, measured = load_recipe(TINY, ["eval.engine=served"]), ["eval.datasets=[]", "eval.suites=[general]"]
    assert evaluate.STAGE.settings(asked)["engine"] == "served"
    served, within = (evaluate.STAGE.settings(load_recipe(TINY, [*measured, *more])) for more in (["eval.engine=served"], []))
    assert served == within


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["eval.engine=http://127.0.0.1:8000/v1#mine"], "the one model mine"),
        (["eval.engine=served", "chat.chatter=openai", "chat.url=http://127.0.0.1:8000/v1"], "a server that runs already"),
        (["eval.engine=http://me:secret@there/v1"], "no user, password or query"),
        (["eval.engine=http://there/v1?key=secret"], "no user, password or query"),
    ],
)
def test_a_server_that_knows_one_model_only_and_a_url_with_a_secret_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        check(load_recipe(TINY, overrides))
    assert "secret" not in str(caught.value)


def test_what_serves_is_in_the_key_by_its_own_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(TINY, ["eval.engine=served"])
    embedded = evaluate.STAGE.settings(recipe)
    assert (embedded["chatter"], embedded["software"]["transformers"]) == ("transformers", version("transformers"))
    monkeypatch.setattr(lmdeploy, "unavailable", lambda: None)
    settings = evaluate.STAGE.settings(recipe)
    assert settings["chatter"] == "lmdeploy", "auto means another server on another machine"
    assert settings["software"]["lmdeploy"] == pinned_versions(KNOWN["lmdeploy"].constraints)["lmdeploy"]


def test_files_behind_a_linked_folder_count(tmp_path: Path) -> None:
    (tmp_path / "disk" / "ARC").mkdir(parents=True)
    (tmp_path / "disk" / "ARC" / "test.jsonl").write_text("{}")
    (tmp_path / "compass").mkdir()
    (tmp_path / "compass" / "data").symlink_to(tmp_path / "disk")
    recipe = load_recipe(TINY, [f"eval.datasets=[{{name: ARC_c_ppl, kind: collection, path: {tmp_path / 'compass'}}}]"])
    assert evaluate.STAGE.files(recipe) == [tmp_path / "compass" / "data" / "ARC" / "test.jsonl"]


@pytest.mark.parametrize(
    ("score", "told"),
    [
        (DatasetScore("accuracy", ()), "data set chats: no sample was asked"),
        (DatasetScore("rouge1", (), reported=float("nan")), "data set chats: its rouge1 is nan, which is no figure"),
        (DatasetScore("loss", (Sample("q", "", "", float("inf")),)), "data set chats: its loss is inf"),
    ],
)
def test_what_is_no_figure_is_told_where_it_arises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: DatasetScore, told: str) -> None:
    monkeypatch.setattr("pipelines.evaluators.opencompass.evaluate", lambda *_: {"chats": score})
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "base" / "model" / "chat_template.jinja").write_text("x")
    parts = {part: tmp_path / part for part in ("payload", "record", "scratch", "cache")}
    for folder in parts.values():
        folder.mkdir()
    with pytest.raises(DataError, match=told):
        evaluate.run(load_recipe(TINY), Work({"model": tmp_path / "base"}, **parts, log=print))
    assert not list(parts["payload"].iterdir())


def test_the_list_names_suites_and_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    list_suites()
    told = capsys.readouterr().out
    assert all(word in told for word in (*shipped_names(), "general_questions (choice)", *evaluate.kinds()))


@pytest.mark.parametrize("settings", ["{}", '{"chat_template": null}'])
def test_a_base_model_without_a_chat_template_is_asked_by_the_recipe_s(tmp_path: Path, tiny_model_folder: Path, settings: str) -> None:
    assert evaluate.with_template(tiny_model_folder, "qwen2", tmp_path / "unused") == tiny_model_folder
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (bare / name).write_bytes((tiny_model_folder / name).read_bytes())
    (bare / "tokenizer_config.json").write_text(settings)
    assert evaluate.with_template(bare, None, tmp_path / "unused") == bare
    speaking = evaluate.with_template(bare, "chatml", tmp_path / "speaking")
    assert (speaking / "chat_template.jinja").read_text() == chatml.JINJA
    assert (speaking / "config.json").read_bytes() == (bare / "config.json").read_bytes()
    assert not (bare / "chat_template.jinja").exists()
