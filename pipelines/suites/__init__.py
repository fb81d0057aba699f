"""Suites: lists of data sets under a name, shipped beside this file or in a YAML file of the user's.

description: What it tells.
datasets:
  - {name: facts, kind: choice, path: data/general/facts.jsonl}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from pipelines import shipped
from pipelines.recipe import EvalConfig, EvalDataset, resolve_path
from xtuner_core.config import Config
from xtuner_core.errors import RecipeError

SHIPPED = Path(__file__).resolve().parent


class Suite(Config):
    """The fields of a suite's file."""

    description: str = Field(default="", description="One line for `xtuner list-suites`.")
    datasets: tuple[EvalDataset, ...] = Field(min_length=1, description="What the model is asked.")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A data set that a recipe asks for."""

    dataset: EvalDataset
    """Its path is absolute."""
    suite: str | None
    """The suite that brought it; None if the recipe itself did."""


def shipped_names() -> list[str]:
    """The suites that come with the project."""
    return shipped.names(SHIPPED)


def load_suite(name_or_path: str) -> Suite:
    """Read a suite.

    Raises:
        RecipeError: unknown (the message lists the shipped ones), unreadable, empty, or with a wrong field.
    """
    file = _suite_file(name_or_path)
    try:
        return _parsed(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "(whole suite)"
        raise RecipeError(f"{file}: {field}: {problem['msg']}. A suite has a description and a list of datasets.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not readable as YAML: {error}") from None


@lru_cache(maxsize=8)
def _parsed(text: str) -> Suite:
    """A run asks for its suites a dozen times."""
    return Suite.model_validate(yaml.safe_load(text))


def chosen(config: EvalConfig) -> tuple[Chosen, ...]:
    """Every data set that is asked: of the suites in their order, then the recipe's own.

    Raises:
        RecipeError: as `load_suite`; nothing is asked, or two sets have one name.
    """
    found = (*_of_suites(config.suites), *(_choose(dataset, None, None) for dataset in config.datasets))
    if not found:
        raise RecipeError("eval: no data set is asked. Name a suite in eval.suites, or list sets in eval.datasets.")
    twice = [name for name, count in Counter(one.dataset.name for one in found).items() if count > 1]
    if twice:
        raise RecipeError(f"eval: two data sets are called {twice[0]!r}; each needs a name of its own, also across suites.")
    return found


def _of_suites(names: tuple[str, ...]) -> Iterator[Chosen]:
    for name in names:
        folder = _suite_file(name).parent
        yield from (_choose(dataset, _suite_file(name).stem, folder) for dataset in load_suite(name).datasets)


def _choose(dataset: EvalDataset, suite: str | None, folder: Path | None) -> Chosen:
    """A suite's relative paths mean the files beside it, if they are there."""
    if dataset.path is None:
        return Chosen(dataset, suite)
    beside = folder / dataset.path if folder else None
    path = beside.resolve() if beside and beside.exists() else resolve_path(dataset.path)
    return Chosen(dataset.model_copy(update={"path": str(path)}), suite)


def _suite_file(name_or_path: str) -> Path:
    return shipped.find(SHIPPED, name_or_path, "suite", "suites")
