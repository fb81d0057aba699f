"""Smoke tests are read from YAML; what is wrong with one is said with its file, prompt and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import chat
from pipelines.recipe import load_recipe
from pipelines.smoke.lists import load_smoke, shipped_names
from xtuner_core.errors import RecipeError

GOOD = """
prompts:
  - {name: one, system: Be brief., user: "Hi?", expect: {contains: hello, max_seconds: 2}}
  - {name: two, messages: [{role: user, content: a}, {role: assistant, content: b}, {role: user, content: c}], max_tokens: 4}
"""


def _file(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    one, two = load_smoke(_file(tmp_path, GOOD)).prompts
    assert one.conversation() == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    assert (one.max_tokens, one.expect.contains, one.expect.stops) == (128, ("hello",), True)
    assert [turn["content"] for turn in two.conversation()] == ["a", "b", "c"]


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_ones_are_whole(name: str) -> None:
    assert 8 <= len(load_smoke(name).prompts) <= 12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompts: []", "it has no prompts"),
        ("{}", "prompts: Field required"),
        ("- a", "has the fields description, prompts; this file holds list"),
        ("", "this file holds NoneType"),
        ("prompts: [{", "not readable as YAML"),
        (
            "prompts: [{name: a, user: b, expect: {regex: '(x'}}]",
            r"prompts.0.expect.regex \(prompt 'a'\): no regular expression: missing",
        ),
        ("prompts: [{name: a, user: b, expects: {}}]", r"prompts.0.expects \(prompt 'a'\): no such field"),
        ("prompts: [{user: b}]", r"prompts.0.name: Field required"),
        ("prompts: [{name: a}]", r"prompts.0 \(prompt 'a'\): a prompt has either user or messages"),
        ("prompts: [{name: a, user: b, messages: [{role: user, content: c}]}]", "either user or messages"),
        ("prompts: [{name: a, messages: [{role: assistant, content: c}]}]", "must end with a turn of the user"),
        ("prompts: [{name: a, user: b}, {name: a, user: c}]", "two prompts are called 'a'"),
        ("prompts: 3", "prompts: Input should be a valid tuple"),
    ],
)
def test_what_is_wrong_is_named(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"mine\.yaml: (?s:.*){reason}"):
        load_smoke(_file(tmp_path, text))


def test_an_unknown_name_is_answered_with_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"chat\.smoke 'nosuch': no such file, and the shipped smoke tests are general, sound"):
        load_smoke("nosuch")


def test_what_the_prompts_say_decides_the_key_not_where_they_lie(tmp_path: Path) -> None:
    def settings(text: str, name: str) -> object:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return chat.STAGE.settings(load_recipe("qwen3_tiny_full_openai", [f"chat.smoke={tmp_path / name}"]))

    assert settings(GOOD, "a.yaml") == settings("# the same\ndescription: moved\n" + GOOD, "b.yaml")
    assert settings(GOOD, "a.yaml") != settings(GOOD.replace("Hi?", "Ho?"), "b.yaml")


def test_a_recipe_must_ask_something() -> None:
    with pytest.raises(RecipeError, match=r"chat: .*nothing is asked; give smoke"):
        load_recipe("qwen3_tiny_full_openai", ["chat.prompts=null"])


def test_a_server_s_address_needs_the_chatter_that_asks_it() -> None:
    address = "chat.url=http://127.0.0.1:8000/v1"
    with pytest.raises(RecipeError, match="url is for chatter openai"):
        load_recipe("qwen3_tiny_full_openai", [address])
    assert load_recipe("qwen3_tiny_full_openai", [address, "chat.chatter=openai"]).chat.url == "http://127.0.0.1:8000/v1"
