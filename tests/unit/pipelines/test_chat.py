"""The chat stage's pure parts: which questions are asked, the verdict, what decides the artifact's key."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pipelines import chat, environments
from pipelines.chat import judge, spread, told
from pipelines.client import Reply
from pipelines.heldout import HeldOut
from pipelines.recipe import ChatConfig, Recipe, load_recipe
from pipelines.smoke.lists import Prompt
from xtuner_core.errors import DataError

CONFIG = ChatConfig.model_validate({"prompts": "x.jsonl", "min_correct": 0.8, "max_tokens": 8})


def _judge(*texts: str, finish: str = "stop", **changes: object) -> dict[str, Any]:
    """The verdict about these answers to a held-out question whose right answer is yes."""
    replies = [Reply(text, finish, 2, "server", 0.1, 0.2) for text in texts]
    return judge([], [], [HeldOut(({"role": "user", "content": "?"},), "yes", 1)] * len(texts), replies, CONFIG.model_copy(update=changes))


def _recipe(*overrides: str) -> Recipe:
    return load_recipe("qwen3_tiny_full_openai", overrides)


@pytest.mark.parametrize(("count", "lines"), [(1, [1]), (2, [1, 6]), (4, [1, 3, 6, 8]), (10, list(range(1, 11))), (99, list(range(1, 11)))])
def test_questions_are_spread_over_the_file(count: int, lines: list[int]) -> None:
    samples = [HeldOut(({"role": "user", "content": "?"},), "yes", line) for line in range(1, 11)]
    assert [sample.line for sample in spread(samples, count)] == lines


def test_exactly_the_asked_share_is_enough() -> None:
    result = _judge("yes", "yes", "yes", "yes", "no")
    assert (result["passed"], result["total"], result["ok"], result["why"]) == (4, 5, True, [])


def test_one_right_answer_too_few_fails_and_says_so() -> None:
    result = _judge("yes", "yes", "yes", "no", "no")
    assert result["ok"] is False
    assert result["why"] == ["3 of 5 answers are right, chat.min_correct asks for a share of 0.8"]


def test_an_empty_answer_fails_however_few_must_be_right() -> None:
    result = _judge("yes", " \n", min_correct=0.0)
    assert (result["ok"], result["why"]) == (False, ["1 of 2 answers are empty"])


@pytest.mark.parametrize(("must_stop", "ok"), [(True, False), (False, True)])
def test_an_answer_that_was_cut_fails_only_if_it_must_stop(must_stop: bool, ok: bool) -> None:
    assert _judge("yes", finish="length", must_stop=must_stop)["ok"] is ok


def test_a_smoke_prompt_that_fails_is_named_with_every_reason() -> None:
    prompts = [Prompt.model_validate({"name": name, "user": "?", "expect": {"contains": "yes"}}) for name in ("good", "bad")]
    replies = [Reply(text, finish, 2, "server", 0.1, 0.2) for text, finish in (("Yes.", "stop"), ("No", "length"))]
    result = judge(prompts, replies, [], [], CONFIG)
    assert (result["smoke_passed"], result["smoke_total"], result["passed"], result["total"], result["ok"]) == (1, 2, 0, 0, False)
    assert result["why"] == ["smoke prompt bad did not end by itself within 2 tokens", "smoke prompt bad does not contain 'yes'"]
    speed = {"first_token_seconds": 0.1, "tokens_per_second": 30.4}
    assert told(result | speed).startswith("1 of 2 smoke prompts pass, first token after 0.10 s, then 30 tokens/s; smoke prompt bad did")
    assert told(_judge("yes") | {"first_token_seconds": None, "tokens_per_second": None}) == "1 of 1 answers are right"


def test_port_and_path_of_the_prompts_do_not_decide_the_key_but_their_bytes_do(tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_text("{}")
    plain, other = _recipe(), _recipe(f"chat.prompts={moved}", "chat.port=8123")
    assert chat.STAGE.settings(plain) == chat.STAGE.settings(other)
    assert chat.STAGE.files(other) == [moved]
    assert chat.STAGE.settings(_recipe("chat.max_tokens=9")) != chat.STAGE.settings(plain)


def test_missing_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file.*chat\.prompts"):
        chat.STAGE.files(_recipe(f"chat.prompts={tmp_path / 'gone.jsonl'}"))


def test_what_serves_decides_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is another server where there is a GPU, with software of its own."""
    monkeypatch.setattr(environments, "cuda_is_visible", lambda: False)
    settings = {name: chat.STAGE.settings(_recipe(f"chat.chatter={name}")) for name in ("auto", "transformers", "lmdeploy")}
    assert settings["auto"] == settings["transformers"]
    assert settings["auto"]["software"]["torch"] == version("torch")
    pins = environments.pinned_versions(environments.KNOWN["lmdeploy"].constraints)
    assert {pins[name] for name in ("lmdeploy", "torch")} <= set(settings["lmdeploy"]["software"].values())
    monkeypatch.setattr(environments, "cuda_is_visible", lambda: True)
    monkeypatch.setattr(environments, "built", lambda name: Path("python"))
    assert chat.STAGE.settings(_recipe("chat.chatter=auto")) == settings["lmdeploy"]
