"""Stage eval: how many held-out questions the model answers exactly right.

payload/scores.json     per data set: accuracy in percent, counts, and every sample with the model's answer
record/<evaluator>/     the evaluator's own settings, logs and summary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines import evaluators
from pipelines.evaluators import DatasetScore
from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Metrics, Stage, Work
from xtuner_core import registry
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError


def run(recipe: Recipe, work: Work) -> Metrics:
    """Judge the model in `inputs["model"]/model`; metrics: data set → accuracy in percent.

    Raises:
        RecipeError: unknown evaluator.
        DataError: bad held-out data, or the evaluator failed.
        StorageError: the evaluator's environment cannot be built.
    """
    evaluator = registry.find(evaluators, recipe.eval.evaluator)
    folder = work.record / recipe.eval.evaluator
    folder.mkdir()
    scores = evaluator.evaluate(work.inputs["model"] / "model", recipe.eval, folder, work.log)
    write_json(work.payload / "scores.json", {"datasets": {name: _as_json(score) for name, score in scores.items()}})
    for name, score in scores.items():
        work.log(f"{name}: {score.correct} of {score.total} correct ({score.accuracy:.1f} %)")
    return {"scores": {name: score.accuracy for name, score in scores.items()}}


def _as_json(score: DatasetScore) -> dict[str, Any]:
    samples = [
        {"question": sample.question, "expected": sample.expected, "answer": sample.answer, "correct": sample.correct}
        for sample in score.samples
    ]
    return {"accuracy": score.accuracy, "correct": score.correct, "total": score.total, "samples": samples}


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the answers; not the files' paths (their contents count) and not the timeout."""
    return {
        "evaluator": recipe.eval.evaluator,
        "versions": registry.find(evaluators, recipe.eval.evaluator).versions(),
        "datasets": [{"name": dataset.name, "max_out_len": dataset.max_out_len} for dataset in recipe.eval.datasets],
        "batch_size": recipe.eval.batch_size,
        "limit": recipe.eval.limit,
    }


def files(recipe: Recipe) -> list[Path]:
    """The held-out files.

    Raises:
        DataError: one is missing.
    """
    return [_existing(index, resolve_path(dataset.path)) for index, dataset in enumerate(recipe.eval.datasets)]


def _existing(index: int, path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Correct eval.datasets[{index}].path in the recipe.")
    return path


STAGE = Stage(name="eval", version=1, run=run, settings=settings, files=files)
