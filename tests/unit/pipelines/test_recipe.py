"""The recipe: what is read, what `--set` changes, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.prepare import files_of
from pipelines.recipe import PROJECT, Recipe, load_recipe, parse_recipe, recipe_file, resolve_path, shipped_names
from xtuner_core.errors import RecipeError

TINY = "qwen3_tiny_full_openai"


def _tiny(*overrides: str) -> Recipe:
    return load_recipe(TINY, overrides)


def _complaint(recipe: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 78
    return str(caught.value)


def _edited(folder: Path, **changes: Any) -> str:
    """The tiny recipe as a file of the user's, with some top-level fields replaced."""
    tree = yaml.safe_load(recipe_file(TINY).read_text(encoding="utf-8"))
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}, allow_unicode=True), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_are_whole_and_named_as_their_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    paths = [*(dataset.path for dataset in recipe.eval.datasets), recipe.chat.prompts]
    assert all(resolve_path(path).is_file() for path in paths)
    assert files_of(recipe)


def test_a_recipe_survives_json_as_the_prefect_form_sends_it() -> None:
    recipe = _tiny("train.lora={targets: [q_proj, v_proj]}")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _tiny().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_recipe_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(_edited(tmp_path, seed=7)).seed == 7
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml").seed == 7


def test_a_folder_called_like_a_shipped_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / TINY).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(TINY).name == TINY


@pytest.mark.parametrize("name", ["nosuch", "nosuch.yaml", "", ".", "../recipe", "/"])
def test_an_unknown_recipe_lists_the_shipped_ones(name: str) -> None:
    complaint = _complaint(name)
    assert repr(name) in complaint
    assert all(shipped in complaint for shipped in shipped_names())


@pytest.mark.parametrize(
    ("override", "field", "known"),
    [
        (
            "learning_rate=1",
            "learning_rate",
            "chat, convert, data, description, eval, launch, model, name, promotion, retrain, seed, timeout_hours, train",
        ),
        ("train.learning_rate=1", "train.learning_rate", "epochs"),
        ("train.lora.r=4", "train.lora.r", "alpha, dora, dropout, rank, rslora, targets"),
        ("optim.lr=1", "optim", "train"),
        ("eval.datasets=[{name: a, path: b, max_len: 4}]", "eval.datasets.0.max_len", "kind, max_out_len, name, path"),
    ],
)
def test_an_unknown_field_names_file_field_and_the_known_ones(override: str, field: str, known: str) -> None:
    complaint = _complaint(TINY, override)
    assert complaint.startswith(f"{recipe_file(TINY)}: unknown field {field}; known there: ")
    assert known in complaint


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.lr=0", "train.lr: Input should be greater than 0 (got 0)"),
        ("train.lr=-1e-3", "train.lr: "),
        ("train.lr=fast", "train.lr: Input should be a valid number, unable to parse string as a number (got 'fast')"),
        ("train.lr=.nan", "train.lr: "),
        ("train.lr_min=1", "train: Value error, lr_min (1.0) is greater than lr (0.005)"),
        ("train.total_step=0", "train.total_step: "),
        ("train.dtype=fp16", "train.dtype: Input should be 'bf16' or 'fp32' (got 'fp16')"),
        ("train.global_batch_size=2.5", "train.global_batch_size: "),
        ("train.processes=3", "must be a multiple of processes (3)"),
        ("data.max_length=4096", "max_length (4096) is greater than pack_length (1024), and only packing hard cuts documents"),
        ("data.max_rejected=1.5", "data.max_rejected: "),
        ("data.train=[]", "data.train: "),
        ("chat.port=70000", "chat.port: "),
        ("chat.min_correct=2", "chat.min_correct: "),
        ("eval.datasets=[{name: Not OK, path: x}]", "eval.datasets.0.name: "),
        ("eval.timeout=5", "eval.timeout: "),
        ("eval.gate=[{dataset: chats}]", "eval.gate.0: Value error, a rule says either beat_by or lose_at_most"),
        ("eval.gate=[{dataset: chats, beat_by: 1, lose_at_most: 1}]", "a rule says either beat_by or lose_at_most"),
        ("eval.gate=[{dataset: chats, beat_by: .inf}]", "eval.gate.0.beat_by: Input should be a finite number"),
        ("seed=-1", "seed: "),
        ("name=../up", "name: String should match pattern"),
        ("model=", "model: "),
        ("model={}", "model.base is missing"),
        ("convert.max_shard_size=5", "convert.max_shard_size: "),
        ("chat={1: 2}", "chat"),
    ],
)
def test_a_bad_value_names_file_field_and_reason(override: str, reason: str) -> None:
    complaint = _complaint(TINY, override)
    assert complaint.startswith(f"{recipe_file(TINY)}: ")
    assert reason in complaint


def test_every_wrong_field_is_told_at_once(tmp_path: Path) -> None:
    complaint = _complaint(_edited(tmp_path, seed=-1, extra=1, chat=None)).splitlines()
    assert sorted(line.split(": ")[1].split(";")[0] for line in complaint) == ["chat", "seed", "unknown field extra"]


def test_a_huge_value_does_not_flood_the_terminal() -> None:
    bomb = "[" + ", ".join(["aaaaaaaaaa"] * 5000) + "]"
    assert len(_complaint(TINY, f"model={bomb}")) < 400


@pytest.mark.parametrize(
    "text",
    [b"a: [1", b"a: b: c", b"\xff\xfe\x00", b"a: \x00", b"&a [*b]", b"- 2001-99-99", b"!!python/object/apply:os.getcwd []", b"[" * 600],
    ids=["open list", "two colons", "no utf-8", "nul", "no anchor", "no date", "a program", "too deep"],
)
def test_unreadable_yaml_names_the_file(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    assert _complaint(str(path)).startswith(f"{path}: not readable as YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("[1]", "list"), ("just text", "str"), ("7", "int")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert _complaint(str(path)) == f"{path}: a recipe is a mapping of fields, this file holds {kind}."


def train_paths(recipe: Recipe) -> tuple[str, ...]:
    return tuple(source.path for source in recipe.data.train)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda recipe: recipe.seed, 7),
        ("train.lr=1e-4", lambda recipe: recipe.train.lr, 1e-4),
        ("train.lora.rank=4", lambda recipe: recipe.train.lora.rank, 4),
        ("train.lora={rank: 4}", lambda recipe: recipe.train.lora.rank, 4),
        ("train.lora.targets=[q_proj, v_proj]", lambda recipe: recipe.train.lora.targets, ("q_proj", "v_proj")),
        ("train.betas=[0.8, 0.9]", lambda recipe: recipe.train.betas, (0.8, 0.9)),
        ("data.train=a.jsonl", train_paths, ("a.jsonl",)),
        ("data.train=a.jsonl,b.jsonl", train_paths, ("a.jsonl", "b.jsonl")),
        ("data.train=a.jsonl, b.jsonl", train_paths, ("a.jsonl", "b.jsonl")),
        ("data.train=[a.jsonl, b.jsonl]", train_paths, ("a.jsonl", "b.jsonl")),
        ("data.train=data/*.jsonl", train_paths, ("data/*.jsonl",)),
        ("eval.limit=null", lambda recipe: recipe.eval.limit, None),
        ("eval.datasets=[{name: a, path: x=y.jsonl}]", lambda recipe: recipe.eval.datasets[0].path, "x=y.jsonl"),
        ("chat.must_stop=true", lambda recipe: recipe.chat.must_stop, True),
        ("model.base=a/[b", lambda recipe: recipe.model.base, "a/[b"),
        ("model.base=[b", lambda recipe: recipe.model.base, "[b"),  # no YAML: taken as text
    ],
)
def test_set_changes_one_field(override: str, read: Any, value: Any) -> None:
    recipe = _tiny(override)
    assert read(recipe) == value
    field = override.split("=")[0].split(".")[0]
    assert recipe.model_dump(exclude={field}) == _tiny().model_dump(exclude={field})


def test_a_path_with_a_comma_is_one_path_if_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "a,b.jsonl"
    path.touch()
    assert train_paths(_tiny(f"data.train={path}")) == (str(path),)


def test_the_last_set_wins() -> None:
    assert _tiny("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(("override", "steps", "epochs"), [("train.total_step=20", 20, None), ("train.epochs=2", None, 2)])
def test_steps_replace_epochs_and_the_other_way_round(override: str, steps: int | None, epochs: int | None) -> None:
    for name in shipped_names():  # one of them says epochs, the other total_step
        recipe = load_recipe(name, [override])
        assert (recipe.train.total_step, recipe.train.epochs) == (steps, epochs)


def test_a_file_may_not_say_both(tmp_path: Path) -> None:
    path = _edited(tmp_path, train={"epochs": 1, "total_step": 1})
    assert _complaint(path) == f"{path}: train: Value error, give epochs or total_step, not both (got {{'epochs': 1, 'total_step': 1}})."


@pytest.mark.parametrize("override", ["seed", "=7", ""])
def test_set_without_field_or_value_shows_how(override: str) -> None:
    assert "write field=value" in _complaint(TINY, override)


@pytest.mark.parametrize("override", ["seed.x=1", "eval.datasets.0.name=x", "train.lr.peak=1"])
def test_set_below_a_value_is_told(override: str) -> None:
    assert _complaint(TINY, override).endswith("is a value, it has no fields.")


@given(
    st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5), max_size=4)
)
def test_any_mapping_is_a_recipe_or_a_told_mistake(tree: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"(?s)^form: "):  # none of them has the needed fields
        parse_recipe(tree, source="form")


@given(st.text(alphabet="abc.=:[]{}'\"!&*-,1 \n\x00", max_size=30))
def test_any_set_is_a_change_or_a_told_mistake(override: str) -> None:
    try:
        load_recipe(TINY, [override])
    except RecipeError as error:
        assert str(error)


def test_paths_are_looked_up_here_then_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = "data/openai_chats/train.jsonl"
    monkeypatch.chdir(tmp_path)
    assert resolve_path(shipped) == PROJECT / shipped
    (tmp_path / shipped).parent.mkdir(parents=True)
    (tmp_path / shipped).touch()
    assert resolve_path(shipped) == (tmp_path / shipped).resolve()
    assert resolve_path(str(tmp_path / "absent")) == tmp_path / "absent"
