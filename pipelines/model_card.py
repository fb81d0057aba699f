"""The model card of an exported folder: README.md with the YAML header of the Hugging Face Hub. Equal inputs give equal bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.comparison.figures import figure, gained, percent
from pipelines.recipe import Recipe, resolve_path

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Facts = Mapping[str, Any]
CONTENDERS = ("base", "production", "tuned")


def card(recipe: Recipe, facts: Facts, scores: Mapping[str, Any] | None = None) -> str:
    """The text of README.md: header, recipe, data, training, precision, checks, scores, how to use it.

    Without scores it is the card beside the weights, and tells nothing but what decided them: the recipe may be renamed, or its evaluation
    changed, and they stay what they are. With scores it is the verdict's, and tells the recipe's name and description too.

    `facts` is what the convert stage found (its payload/facts.json): `base`, `license` (None: not known), `relation` (finetune, adapter
    or merge), `dtype`, `tensors`, `parameters`, `checks` {name: figure}, `data` [{file, sha256 of its token ids}], `counts` {name: number}
    and `training` {name: figure}. `scores` is the verdict's scores.json.
    """
    sections = (
        _about(recipe, facts, named=scores is not None),
        _scores(scores) if scores else "",
        _section("Recipe", f"```yaml\n{_yaml(deciding(recipe) if scores is None else shown_recipe(recipe))}```"),
        _section(
            "Data",
            _table(("file", "sha256 of its token ids"), [(one["file"], one["sha256"]) for one in facts["data"]]),
            _figures(facts["counts"]),
        ),
        _section("Training", _figures(facts["training"])),
        _section("Export", f"Weights in {facts['dtype']}. Checked before it was published:", _figures(_checked(facts))),
        _section("Use", _use(facts)),
    )
    return f"---\n{_header(recipe, facts, scores)}\n---\n\n" + "\n".join(section for section in sections if section)


def base_name(recipe: Recipe) -> str:
    """What readers call the base model: its hub id or package; of a path on this machine the last part."""
    base = recipe.model.base
    return Path(base).name if resolve_path(base).exists() or base.startswith(("/", ".", "~")) else base


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe the card with the scores shows."""
    return {"name": recipe.name, **deciding(recipe)}


def deciding(recipe: Recipe) -> dict[str, Any]:
    """All of the recipe that decides the weights, without a path of this machine."""
    data = recipe.data.model_dump(mode="json", exclude={"workers", "runner", "max_rejected"})
    data["train"] = [{**source, "path": Path(source["path"]).name} for source in data["train"]]
    if isinstance(data["validation"], list):
        data["validation"] = [Path(path).name for path in data["validation"]]
    return {
        "model": {**recipe.model.model_dump(mode="json"), "base": base_name(recipe)},
        "data": data,
        "train": recipe.train.deciding(),
        "convert": recipe.convert.model_dump(mode="json"),
        "seed": recipe.seed,
    }


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _header(recipe: Recipe, facts: Facts, scores: Mapping[str, Any] | None) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=facts["base"],
        base_model_relation=facts["relation"],
        license=facts["license"],
        library_name="peft" if facts["relation"] == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["xtuner", recipe.train.method],
        model_name=recipe.name if scores else None,
        eval_results=_results(scores) if scores else None,
    ).to_yaml(line_break="\n")


def _results(scores: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=one["metric"],
            metric_value=one["values"]["tuned"],
        )
        for name, one in scores["datasets"].items()
    ]


def _about(recipe: Recipe, facts: Facts, named: bool) -> str:
    made = "A low-rank adapter for" if facts["relation"] == "adapter" else "A fine-tuned version of"
    licence = f"Licence of the base: {plain(facts['license'])}." if facts["license"] else "The base model does not say its licence."
    method = "all weights" if recipe.train.method == "full" else recipe.train.method
    told = f" {plain(recipe.description)}" if named and recipe.description else ""
    title = recipe.name if named else f"{facts['base']}, {recipe.train.method}"
    return f"# {plain(title)}\n\n{made} {plain(facts['base'])} (trained: {method}).{told}\n{licence}\n"


def _scores(scores: Mapping[str, Any]) -> str:
    """A row for each data set: the figures, and how much better the tuned model is than the others, with its interval."""
    contenders = [name for name in CONTENDERS if any(name in one["values"] for one in scores["datasets"].values())]
    others = [name for name in contenders if name != "tuned"]
    head = ("data set", "metric", *contenders, *(f"better than {name}" for name in others))
    rows = [
        (
            name,
            one["metric"],
            *(figure(one["values"][contender], one["unit"]) for contender in contenders),
            *(gained(one["differences"][other], one["unit"]) for other in others),
        )
        for name, one in scores["datasets"].items()
    ]
    told = f"In brackets: {percent(scores['confidence'])} interval of the difference; a positive difference is a better model."
    return _section("Scores", _table(head, rows), told)


def _checked(facts: Facts) -> dict[str, Any]:
    return {"tensors": facts["tensors"], "parameters": facts["parameters"], **facts["checks"]}


def _use(facts: Facts) -> str:
    if facts["relation"] == "adapter":
        return _code("python", "from peft import AutoPeftModelForCausalLM", 'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")')
    return "\n\n".join((
        _code(
            "python",
            "from transformers import pipeline",
            'ask = pipeline("text-generation", model="FOLDER")',
            'print(ask([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])',
        ),
        _code("sh", "xtuner chat FOLDER", "lmdeploy serve api_server FOLDER --server-name 127.0.0.1", "vllm serve FOLDER --host 127.0.0.1"),
    ))  # fmt: skip


def _code(language: str, *lines: str) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _section(title: str, *parts: str) -> str:
    body = "\n\n".join(part for part in parts if part)
    return f"## {title}\n\n{body}\n" if body else ""


def _figures(figures: Mapping[str, Any]) -> str:
    return "\n".join(f"- {plain(name.replace('_', ' '))}: {_number(figure)}" for name, figure in figures.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [tuple(map(plain, row)) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (tuple(map(plain, head)), ("---",) * len(head), *rows)) if rows else ""


def _number(figure: Any) -> str:
    if figure is None:
        return "–"
    return f"{figure:.4g}" if isinstance(figure, float) else plain(str(figure))


def plain(text: str) -> str:
    """Text from data or file names as Markdown that shows just these characters, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))
