"""One run of the engine on its own: which model, which files, how it is trained; as a file and as flags (xtuner_core/arguments.py).

No torch import here: `--help` and a mistake are answered at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from xtuner_core.config import Config, DataConfig, SftConfig, TrainConfig
from xtuner_core.errors import RecipeError

Tree = dict[str, Any]
_Kind = TypeVar("_Kind", bound=Config)
PIPELINE_ONLY = ("name", "description", "convert", "eval", "chat", "retrain", "promotion")
"""Sections of a pipeline's recipe that say nothing about training."""
_ALTERNATIVES: dict[tuple[str, ...], str] = {("train", "total_step"): "epochs", ("train", "epochs"): "total_step"}


class ModelChoice(Config):
    """The model that is trained."""

    base: str | None = Field(
        default=None,
        description="Hugging Face folder (config.json, tokenizer.json, safetensors) whose weights are trained on; "
        "preset:NAME means random weights, as in a recipe.",
    )
    config: str | None = Field(
        default=None, description="Random weights instead: a preset's name, a config .json, or a folder that holds a config.json."
    )
    template: str | None = Field(
        default=None,
        description="Chat template, a module of xtuner_core/data/templates, or own (the model's Jinja template, slower); "
        "the one that equals the model's own if not given.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder with a tokenizer.json; if not given the model's own and, for random weights without one, one id a byte.",
    )


class RunConfig(Config):
    """Everything `python -m xtuner_core.sft` can be told; a pipeline's recipe has the same sections."""

    model: ModelChoice = ModelChoice()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    seed: int = Field(default=42, ge=0, description="Seed of random weights, data order, dropout and adapter initialisation.")
    work_dir: Path = Field(default=Path("work_dir"), description="Directory of prepared data, checkpoints, metrics and the result.")
    resume: bool = Field(
        default=True, description="Continue what the work directory holds; otherwise that is moved to previous-TIME beside it."
    )


def read_tree(path: Path) -> Tree:
    """The fields of a JSON or YAML file.

    Raises:
        RecipeError: it is not there, not readable, no mapping, or a program.
    """
    refuse_program("--config", str(path), "write the same fields as YAML")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"--config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "Invalid JSON" if path.suffix == ".json" else "Invalid YAML"
        raise RecipeError(f"--config {path}: {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"--config {path}: the fields must be a mapping, this file holds {type(tree).__name__}.")
    return tree


def refuse_program(flag: str, value: str, instead: str) -> None:
    """Raise RecipeError for a Python file: a configuration is never executed."""
    if value.endswith(".py"):
        raise RecipeError(f"{flag} {value}: a configuration is data and never a program that runs; {instead}.")


def merge(tree: Tree, values: Mapping[tuple[str, ...], Any]) -> Tree:
    """The file's fields with those of the flags, by path, in their place; an alternative of a flag in the file is dropped."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for path, value in values.items():
        other = _ALTERNATIVES.get(path)
        if other and (*path[:-1], other) not in values:
            _section(merged, path[:-1]).pop(other, None)
        _section(merged, path[:-1])[path[-1]] = value
    return merged


def _section(tree: Tree, path: tuple[str, ...]) -> Tree:
    for name in path:
        child = tree.get(name)
        tree[name] = tree = dict(child) if isinstance(child, dict) else {}
    return tree


def is_prepared(tree: Tree) -> bool:
    """Whether the fields name packed data and a model folder, as the pipeline's train stage writes them."""
    return "data_dir" in tree or "model_dir" in tree


def prepared_run(tree: Tree, source: str) -> SftConfig:
    """The run on data that is packed already (RecipeError names the field that is wrong)."""
    return _validated(SftConfig, tree, source)


def whole_run(tree: Tree, source: str, processes: int) -> RunConfig:
    """The run from raw files; what only the pipeline's other stages read is passed over.

    What is not said follows from what is: of `max_length` and `pack_length` the other is moved to fit, a step has at least one pack
    for each of the `processes`.

    Raises:
        RecipeError: names source, field and reason, one line for each wrong field.
    """
    tree = {name: value for name, value in tree.items() if name not in PIPELINE_ONLY}
    if not isinstance(tree.get("data", {}), dict) or not tree.get("data", {}).get("train"):
        raise RecipeError(f"{source}: no training data; give --dataset FILE, folder or glob (field data.train).")
    tree["data"] = _fitting_lengths(tree["data"])
    train = tree.get("train") or {}
    if isinstance(train, dict) and processes > 1:
        tree["train"] = {"global_batch_size": processes, **train}
    run = _validated(RunConfig, tree, source)
    if (run.model.base is None) == (run.model.config is None):
        raise RecipeError(
            f"{source}: give --load-from FOLDER to go on from its weights, or --model-cfg PRESET, config.json or folder for random "
            f"weights: {'not both' if run.model.base else 'one of them'}."
        )
    return run


def _fitting_lengths(data: Tree) -> Tree:
    limit, pack = (DataConfig.model_fields[name].default for name in ("max_length", "pack_length"))
    if "pack_length" in data and "max_length" not in data and isinstance(data["pack_length"], int | str):
        return {**data, "max_length": min(limit, _whole(data["pack_length"], limit))}
    if "max_length" in data and "pack_length" not in data and isinstance(data["max_length"], int | str):
        return {**data, "pack_length": max(pack, _whole(data["max_length"], pack))}
    return data


def _whole(value: Any, otherwise: int) -> int:
    return int(value) if str(value).isdecimal() else otherwise


def _validated(kind: type[_Kind], tree: Tree, source: str) -> _Kind:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(kind, source, problem) for problem in error.errors())) from None


def _explain(kind: type[Config], source: str, problem: Any) -> str:
    field = ".".join(map(str, problem["loc"])) or "the whole"
    if problem["type"] == "extra_forbidden":
        known = _fields_beside(kind, problem["loc"])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"{source}: {field}: no such field{f'; did you mean {near[0]}?' if near else ''} Known there: {', '.join(known)}."
    return f"{source}: {field}: {problem['msg']}."


def _fields_beside(kind: type[Config], location: tuple[Any, ...]) -> list[str]:
    section: Any = kind
    for part in location[:-1]:
        inner = getattr(section, "model_fields", {}).get(part)
        section = inner.annotation if inner else section
    return sorted(getattr(section, "model_fields", {}))
