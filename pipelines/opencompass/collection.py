"""Data sets of OpenCompass' own collection, by the names of its configurations (`gsm8k_gen`, `mmlu_gen`, `ceval_gen`, ...).

Their data is the user's to bring: `path` of the data set is the folder that holds OpenCompass' `data` folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluators import DatasetScore, Sample
from pipelines.opencompass.models import BASE, CHAT
from pipelines.opencompass.output import model_output, verdicts
from pipelines.opencompass.process import caged, failure
from pipelines.recipe import EvalDataset
from pipelines.stage import Log
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError, RecipeError

RESOLVE = Path(__file__).with_name("resolve.py")
FIGURES = ("accuracy", "score")
"""A share of right answers in percent, by these names."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the data sets that a name stands for (of `mmlu_gen` one for each subject), and the number of its samples."""

    name: str
    config: Mapping[str, Any]
    size: int

    @property
    def model(self) -> str:
        """Which form of the model is asked."""
        return CHAT if str(self.config["infer_cfg"]["inferencer"]["type"]).endswith("GenInferencer") else BASE

    @property
    def abbr(self) -> str:
        """Its name in the output folders."""
        return str(self.config["abbr"])


def data_folder(datasets: Sequence[EvalDataset]) -> Path | None:
    """Where the collection's data lies.

    Raises:
        RecipeError: in two places.
    """
    folders = sorted({str(dataset.path) for dataset in datasets if dataset.kind == "collection"})
    if len(folders) > 1:
        raise RecipeError(f"eval: the data of OpenCompass' own sets must lie in one folder, not in {' and '.join(folders)}.")
    return Path(folders[0]) if folders else None


def resolve(python: Path, names: Sequence[str], limit: int | None, data: Path, work: Path, timeout: int, log: Log) -> list[Part]:
    """The data sets that the names stand for.

    Raises:
        RecipeError: OpenCompass has no such name (with the closest ones).
        DataError: the data is not on the disk, or cannot be read; names the place.
    """
    request, answer = work / "names.json", work / "collection.json"
    write_json(request, {"names": list(names), "limit": limit})
    command = [str(python), "-P", str(RESOLVE), str(request.resolve()), str(answer.resolve())]
    caged(command, work, {"COMPASS_DATA_CACHE": str(data)}, timeout, log)
    told = json.loads(answer.read_text(encoding="utf-8"))
    if problem := told.get("problem"):
        raise _complaint(problem, data)
    found = [(name, part) for name in names for part in told["sets"][name]]
    return [Part(name, part["config"] | {"abbr": f"{name}.{part['config']['abbr']}"}, part["size"]) for name, part in found]


def _complaint(problem: Mapping[str, Any], data: Path) -> RecipeError | DataError:
    name = problem["name"]
    if "closest" in problem:
        return RecipeError(f"data set {name}: OpenCompass has no configuration of this name; close ones: {', '.join(problem['closest'])}.")
    if "missing" in problem:
        return DataError(
            f"data set {name}: its data is not at {problem['missing']}. Put OpenCompass' data there (its releases have it as one archive "
            f"with a `data` folder, to be unpacked in {data}), or correct the path of the data set; nothing is downloaded."
        )
    return DataError(f"data set {name}: OpenCompass cannot use it: {problem['reason']}")


def score(work: Path, parts: Sequence[Part]) -> DatasetScore:
    """One name's figure: the mean over its parts, as OpenCompass' summaries have it; `extras` has each part's.

    Samples are told if OpenCompass says of every answer whether it is right, and its figure is the share of these.

    Raises:
        DataError: a part was not answered or has no figure; shows the end of the log.
    """
    figures: dict[str, tuple[str, float]] = {}
    samples: list[Sample] | None = []
    for part in parts:
        predictions, results = model_output(work, part.model, part.abbr)
        if len(predictions) != part.size:
            raise failure(work, f"answered {len(predictions)} of the {part.size} questions of {part.abbr}")
        name, value = figures[part.abbr] = _figure(work, part, results)
        told = [_sample(prediction, verdict, part) for prediction, verdict in zip(predictions, verdicts(results, part.size), strict=True)]
        kept = [sample for sample in told if sample]
        sound = name in FIGURES and len(kept) == part.size and abs(100 * sum(one.score for one in kept) / part.size - value) < 1e-3
        samples = samples + kept if samples is not None and sound else None
    extras = {abbr: value for abbr, (_, value) in figures.items()} if len(parts) > 1 else {}
    if samples:
        return DatasetScore("accuracy", tuple(samples), extras=extras)
    name = next(iter(figures.values()))[0]
    return DatasetScore(name, (), sum(value for _, value in figures.values()) / len(figures), extras)


def _figure(work: Path, part: Part, results: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of a part's first figure, preferably a share of right answers."""
    numbers = {name: float(value) for name, value in results.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    for name in (*FIGURES, *numbers):
        if name in numbers:
            return name, numbers[name]
    raise failure(work, f"reports no figure for {part.abbr}: {str(dict(results))[:200]}")


def _sample(prediction: Mapping[str, Any], verdict: Mapping[str, Any], part: Part) -> Sample | None:
    right = verdict.get("correct", verdict.get("is_correct"))
    if isinstance(right, list) and len(right) == 1:  # scorers that may repeat a question list its runs
        right = right[0]
    if right is None and {"predictions", "references"} <= verdict.keys():
        right = verdict["predictions"] == verdict["references"]
    if not isinstance(right, bool):
        return None
    asked = prediction.get("origin_prompt", "")
    question = asked if isinstance(asked, str) else str(asked[-1].get("prompt", "")) if asked else ""
    return Sample(question, str(prediction.get("gold", "")), str(prediction.get("prediction", "")), float(right), 1 / part.size)
