"""Stage prepare: files of samples → token ids with loss masks, kept per file → packs, with every line accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Log, Metrics, Stage, Work
from xtuner_core.data import shards
from xtuner_core.data.prepare import Input, Plan, code_digest, make_plan, told, write_data
from xtuner_core.data.prepare import inputs_of as _inputs_of


def run(recipe: Recipe, work: Work) -> Metrics:
    """Write `documents/`, `packs/`, `validation/`, `data.json`, `samples.jsonl`, `kept.jsonl`; the report goes to the record.

    Raises:
        DataError: more lines rejected than `data.max_rejected` allows, or nothing is left to train on.
        RecipeError: a file is given twice and differently, or a word that is not known.
    """
    from pipelines.data_report import write_report

    model_dir = work.inputs["base"] / "model"
    steps = plan(recipe, model_dir, work.log)
    with shards.in_use(work.cache):
        if shards.tokenize(steps.jobs, work.cache, recipe.data.workers, work.log) and recipe.data.runner != "local":
            work.log(f"tokenized on this machine: only `xtuner run` and deployments use data.runner {recipe.data.runner}")
        metrics = write_data(steps, recipe.data, recipe.seed, work.cache, work.payload, work.record / "rejected.jsonl")
    write_report(work.payload, work.record, model_dir, [one.file for one in steps.inputs], recipe, metrics)
    work.log(told(metrics))
    return metrics


def plan(recipe: Recipe, model_dir: Path, log: Log) -> Plan:
    """The input files with their formats, what is to be tokenized, and the template."""
    from xtuner_core.data.render import choose_template

    return make_plan(recipe.data, model_dir, choose_template(model_dir, recipe.model.template), log, resolve_path)


def inputs_of(recipe: Recipe) -> list[Input]:
    """Every input file once, in a fixed order."""
    return _inputs_of(recipe.data, resolve_path)


def files_of(recipe: Recipe) -> list[Path]:
    """The input files, in a fixed order."""
    return [one.file for one in inputs_of(recipe)]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All that decides bytes beside the files' own: not where they lie, nor who tokenizes them."""
    data = recipe.data.model_dump(mode="json", exclude={"train", "format", "workers", "runner"})
    inputs = [
        f"{'validation' if one.validation else 'train'} {shards.kind_of(one.file)} as {one.format} × {one.sample_ratio}, draw {one.draw}"
        for one in inputs_of(recipe)
    ]
    if isinstance(recipe.data.validation, tuple):
        data["validation"] = "files"
    return {"data": data, "inputs": inputs, "template": recipe.model.template, "seed": recipe.seed, "code": code_digest()}


STAGE = Stage(name="prepare", version=2, run=run, settings=_settings, files=files_of, libraries=("tokenizers", "numpy"))
