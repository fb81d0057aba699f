"""OpenCompass 0.5.4 in an environment of its own: questions that the model answers, and data sets of its own collection.

It exits 0 when a task fails, so nothing it says is believed before the predictions on disk were compared with what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipelines.chatters import Endpoint
from pipelines.environments import KNOWN, ensure, pinned_versions
from pipelines.evaluators import DatasetScore, Kind
from pipelines.opencompass import collection, own_sets, process
from pipelines.opencompass.models import BASE, CHAT, bare_tokenizer, context_length, in_process, served
from pipelines.recipe import EvalConfig, EvalDataset
from pipelines.stage import Log
from xtuner_core.durable import remove, write_json

KINDS = {
    "qa": Kind("conversations, or columns question and answer; the share of answers that equal the expected text", served=True),
    "mcq": Kind("questions with choices A, B, ...; the share of answers whose letter is right", served=True),
    "ppl": Kind("questions with choices A, B, ...; how often the right one has the lowest perplexity, in OpenCompass' terms"),
    "collection": Kind(
        "a data set of OpenCompass' own collection by its name; path is the folder with OpenCompass' data", folder=True, served=True
    ),
}
ENVIRONMENT = "opencompass"


def versions() -> dict[str, str]:
    """The pins that decide answers and scores."""
    pins = pinned_versions(KNOWN[ENVIRONMENT].constraints)
    return {name: pins[name] for name in ("opencompass", "torch", "transformers", "tokenizers", "numpy")}


def evaluate(
    model_dir: Path, datasets: Sequence[EvalDataset], config: EvalConfig, endpoint: Endpoint | None, work: Path, log: Log
) -> dict[str, DatasetScore]:
    """Ask the model every question of all data sets, greedily, in one run.

    Raises:
        DataError: a data set is unusable, the model folder is none, or OpenCompass failed (with the end of its log).
        RecipeError: OpenCompass' collection has no such data set.
        StorageError: its environment cannot be built.
    """
    own = {dataset.name: dataset for dataset in datasets if dataset.kind != "collection"}
    asked = {name: own_sets.read(dataset, config.limit) for name, dataset in own.items()}
    context, data = context_length(model_dir), collection.data_folder(datasets)
    for name, questions in asked.items():
        own_sets.require_room(model_dir, own[name], questions, context)
        own_sets.write(work / "questions" / f"{name}.jsonl", questions)
    python = ensure(ENVIRONMENT, log)
    names = [dataset.name for dataset in datasets if dataset.kind == "collection"]
    parts = collection.resolve(python, names, config.limit, data, work, config.timeout, log) if data else []
    described: dict[str, list[Mapping[str, Any]]] = {CHAT: [], BASE: []}
    for name, questions in asked.items():
        path = work / "questions" / f"{name}.jsonl"
        described[own_sets.model_of(own[name])].append(own_sets.configure(own[name], path, questions))
    for part in parts:
        described[part.model].append(part.config)
    endpoint = endpoint if described[CHAT] else None
    write_json(work / "config.json", experiment(model_dir, endpoint, described, context, config.batch_size, work))
    process.run(python, work, endpoint, data, config.timeout, log)
    remove(work / "tokenizer")
    scores = {name: own_sets.score(work, own[name], questions) for name, questions in asked.items()}
    return scores | {name: collection.score(work, [part for part in parts if part.name == name]) for name in names}


def experiment(
    model_dir: Path,
    endpoint: Endpoint | None,
    described: Mapping[str, Sequence[Mapping[str, Any]]],
    context: int,
    batch_size: int,
    work: Path,
) -> dict[str, Any]:
    """OpenCompass' whole configuration; `described`: form of the model → the data sets it is asked."""
    models = {name: in_process(name, model_dir, context, batch_size) for name, sets in described.items() if sets}
    if endpoint:
        models[CHAT] = served(endpoint, bare_tokenizer(model_dir, work / "tokenizer"), context, batch_size)
    return {
        "models": list(models.values()),
        "datasets": list(chain.from_iterable(described.values())),
        "model_dataset_combinations": [{"models": [model], "datasets": list(described[name])} for name, model in models.items()],
    }
