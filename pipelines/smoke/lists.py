"""Smoke tests: prompts with expectations that a served model is asked, shipped beside this file or in a YAML file of the user's.

description: What it tells.
prompts:
  - {name: capital, user: What is the capital of France?, expect: {contains: Paris, language: en}}
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines import shipped
from pipelines.smoke.expectations import Expect
from xtuner_core.config import Config
from xtuner_core.errors import RecipeError

SHIPPED = Path(__file__).resolve().parent


class Turn(Config):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: str = Field(description="What is said.")


class Prompt(Config):
    """What the model is asked, and what its answer must be like."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="Name in the results.")
    system: str | None = Field(default=None, description="System prompt; the chat template's own if not given.")
    user: str | None = Field(default=None, description="The question; or a whole conversation in messages.")
    messages: tuple[Turn, ...] = Field(default=(), description="A conversation that ends with the user's turn.")
    max_tokens: int = Field(default=128, ge=1, description="Longest answer, in tokens.")
    expect: Expect = Field(default=Expect(), description="What the answer must be like.")

    @model_validator(mode="after")
    def _one_question(self) -> Prompt:
        if (self.user is None) == (not self.messages):
            raise ValueError("a prompt has either user or messages")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages must end with a turn of the user, which the model answers")
        return self

    def conversation(self) -> list[dict[str, str]]:
        """What is sent."""
        turns = self.messages or (Turn(role="user", content=self.user or ""),)
        opening = (Turn(role="system", content=self.system),) if self.system is not None else ()
        return [turn.model_dump() for turn in (*opening, *turns)]


class Smoke(Config):
    """The fields of a smoke test's file."""

    description: str = Field(default="", description="What it tells of a model.")
    prompts: tuple[Prompt, ...] = Field(description="What the model is asked.")

    @model_validator(mode="after")
    def _named_once(self) -> Smoke:
        if not self.prompts:
            raise ValueError("it has no prompts")
        twice = [name for name, count in Counter(prompt.name for prompt in self.prompts).items() if count > 1]
        if twice:
            raise ValueError(f"two prompts are called {twice[0]!r}")
        return self


def shipped_names() -> list[str]:
    """The smoke tests that come with the project."""
    return shipped.names(SHIPPED)


def smoke_file(name_or_path: str) -> Path:
    """The YAML file that a shipped name or a path means.

    Raises:
        RecipeError: neither exists; the message lists the shipped names.
    """
    return shipped.find(SHIPPED, name_or_path, "chat.smoke", "smoke tests")


def load_smoke(name_or_path: str) -> Smoke:
    """Read a smoke test.

    Raises:
        RecipeError: unknown, unreadable, empty, or a wrong field; names file, prompt, field and reason.
    """
    file = smoke_file(name_or_path)
    try:
        tree = _read(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}: a smoke test has the fields {', '.join(Smoke.model_fields)}; this file holds {type(tree).__name__}.")
    try:
        return Smoke.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(file, tree, problem) for problem in error.errors())) from None


@lru_cache(maxsize=8)
def _read(text: str) -> Any:
    return yaml.safe_load(text)


def _explain(file: Path, tree: dict[str, Any], problem: Any) -> str:
    """Each problem with the name of its prompt, if it has one."""
    field = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    match problem["loc"]:
        case ("prompts", int(index), *_) if isinstance(tree["prompts"][index], dict) and "name" in tree["prompts"][index]:
            field += f" (prompt {tree['prompts'][index]['name']!r})"
    reason = "no such field" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return f"{file}: {field}: {reason}."
