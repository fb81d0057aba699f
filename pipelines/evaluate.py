"""Stage eval: what the model makes of every data set of the recipe.

payload/scores.json     per data set: its figure, how it is told, and every sample with the model's answer
record/<evaluator>/     the evaluator's own settings, logs and summary
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urldefrag, urlsplit

from pipelines import chatters, evaluators
from pipelines.chatters import Endpoint, Request
from pipelines.evaluators import METRICS, OTHER, DatasetScore, Kind
from pipelines.recipe import EvalDataset, Recipe
from pipelines.stage import Metrics, Stage, Work
from pipelines.suites import Chosen, chosen
from xtuner_core import registry
from xtuner_core.data.templates import OWN
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import DataError, RecipeError

IN_PROCESS, SERVED = "in_process", "served"
KEY = "OPENAI_API_KEY"
"""The environment variable with the key of a server at a URL."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Judge the model in `inputs["model"]/model`; metrics: `scores`, data set → figure in its metric's unit.

    Raises:
        RecipeError: unknown suite or kind of data set.
        DataError: bad held-out data, an evaluator failed, or a figure is not a number.
        StorageError: an evaluator's environment cannot be built.
    """
    asked, found = chosen(recipe.eval), {}
    model_dir = with_template(work.inputs["model"] / "model", recipe.model.template, work.scratch / "model")
    with _endpoint(recipe, model_dir, work) as endpoint:
        for name, datasets in _by_evaluator(asked).items():
            folder = work.record / name
            folder.mkdir()
            found |= _module(name).evaluate(model_dir, datasets, recipe.eval, endpoint, folder, work.log)
    scores = {one.dataset.name: _sound(one.dataset.name, found[one.dataset.name]) for one in asked}
    write_json(work.payload / "scores.json", {"datasets": {one.dataset.name: _as_json(one, scores[one.dataset.name]) for one in asked}})
    for name, score in scores.items():
        work.log(f"{name}: {told(score)}")
    return {"scores": {name: score.value for name, score in scores.items()}}


def _sound(name: str, score: DatasetScore) -> DatasetScore:
    """What is not a number compares with nothing, and what was not asked has no figure."""
    if not score.samples and score.reported is None:
        raise DataError(f"data set {name}: no sample was asked.")
    if not all(math.isfinite(figure) for figure in (score.value, *(sample.score for sample in score.samples))):
        raise DataError(f"data set {name}: its {score.metric} is {score.value}, which is no figure. The model or the data set is damaged.")
    return score


def with_template(model_dir: Path, template: str | None, folder: Path) -> Path:
    """The model's folder; for a base model without a chat template `folder`, which has its files and the template of the recipe, as the
    tuned model will have.
    """
    if template is None or template == OWN or _has_template(model_dir):
        return model_dir
    from xtuner_core.data.render import find_template

    folder.mkdir()
    for file in model_dir.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    write_bytes(folder / "chat_template.jinja", (find_template(template).JINJA or "").encode())
    return folder


def _has_template(model_dir: Path) -> bool:
    config = model_dir / "tokenizer_config.json"
    return (model_dir / "chat_template.jinja").is_file() or bool(config.is_file() and json.loads(config.read_bytes()).get("chat_template"))


@contextmanager
def _endpoint(recipe: Recipe, model_dir: Path, work: Work) -> Iterator[Endpoint | None]:
    """Where the model is served while it is judged; None if nothing asks a server.

    At a URL the model is asked for by its folder, as `transformers serve` loads models. (`settings` refuses a URL that ends in #NAME, the
    name of the only model that it would then judge.)
    """
    if not _asks_server(recipe):
        yield None
    elif recipe.eval.engine == SERVED:
        request = Request(model_dir, start_timeout=recipe.chat.start_timeout, url=recipe.chat.url)
        with chatters.choose(recipe.chat.chatter).serve(request, work.record / "server.log", work.log) as endpoint:
            yield endpoint
    else:
        url, name = urldefrag(recipe.eval.engine)
        yield Endpoint(url.rstrip("/"), name or str(model_dir.resolve()), os.environ.get(KEY, "none"))


def _asks_server(recipe: Recipe) -> bool:
    """RecipeError if the engine is none."""
    engine = recipe.eval.engine
    if engine not in (IN_PROCESS, SERVED) and not _is_url(engine):
        raise RecipeError(f"eval.engine: {engine!r} is neither {IN_PROCESS}, {SERVED} nor the URL of an OpenAI API.")
    return engine != IN_PROCESS and any(kinds()[one.dataset.kind].served for one in chosen(recipe.eval))


def _is_url(text: str) -> bool:
    try:
        return urlsplit(text).scheme in ("http", "https") and bool(urlsplit(text).hostname)
    except ValueError:
        return False


def _server(recipe: Recipe) -> dict[str, Any]:
    """Which server answers, as far as that can be known.

    Raises:
        RecipeError: it would answer for base and tuned model alike, or its URL holds a secret, which would be written down.
    """
    engine = recipe.eval.engine
    if engine == SERVED:
        if recipe.chat.chatter == "openai":
            raise _one_for_all("a server that runs already (chatter openai)")
        return {"engine": engine, **chatters.facts(recipe.chat.chatter)}
    url = urlsplit(engine)
    if url.username or url.query:
        raise RecipeError(f"eval.engine: the URL must hold no user, password or query; a key belongs into the environment as {KEY}.")
    if url.fragment:
        raise _one_for_all(f"the one model {url.fragment}")
    return {"engine": engine}


def _one_for_all(model: str) -> RecipeError:
    return RecipeError(
        f"eval.engine: base and tuned model would both be asked of {model}, and the verdict would compare it with itself. Use "
        f"{IN_PROCESS}, {SERVED} with a chatter that starts a server, or the URL (without #NAME) of one that loads models by folder."
    )


def told(score: DatasetScore) -> str:
    """A data set's figure in words."""
    figure = f"{score.metric} {score.value:.4g} {METRICS.get(score.metric, OTHER).unit}".rstrip()
    if score.metric != "accuracy" or not score.samples:
        return figure
    return f"{figure} ({sum(sample.correct for sample in score.samples)} of {len(score.samples)})"


def _as_json(one: Chosen, score: DatasetScore) -> dict[str, Any]:
    metric = METRICS.get(score.metric, OTHER)
    samples = [
        {
            "question": sample.question,
            "expected": sample.expected,
            "answer": sample.answer,
            "score": sample.score,
            "weight": sample.weight,
            "correct": sample.correct,
        }
        for sample in score.samples
    ]
    return {
        "metric": score.metric,
        "unit": metric.unit,
        "scale": metric.scale,
        "higher_is_better": metric.higher_is_better,
        "value": score.value,
        "kind": one.dataset.kind,
        "suite": one.suite,
        "extras": dict(score.extras),
        "samples": samples,
    }


def kinds() -> dict[str, Kind]:
    """Every kind of data set."""
    return {kind: about for name in registry.names(evaluators) for kind, about in _module(name).KINDS.items()}


def _module(name: str) -> ModuleType:
    return registry.find(evaluators, name)


def _by_evaluator(asked: tuple[Chosen, ...]) -> dict[str, list[EvalDataset]]:
    """RecipeError if no evaluator has a kind."""
    known = {kind: name for name in registry.names(evaluators) for kind in _module(name).KINDS}
    found: dict[str, list[EvalDataset]] = {}
    for one in asked:
        kind = one.dataset.kind
        if kind not in known:
            raise RecipeError(f"data set {one.dataset.name}: {kind!r} is not one of the kinds: {', '.join(sorted(known))}.")
        found.setdefault(known[kind], []).append(one.dataset)
    return found


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the answers; not the files' paths (their contents count) and not the timeout."""
    asked = chosen(recipe.eval)
    return {
        **(_server(recipe) if _asks_server(recipe) else {}),
        "datasets": [one.dataset.model_dump(exclude={"path"}) | {"suite": one.suite} for one in asked],
        "versions": {name: _module(name).versions() for name in _by_evaluator(asked)},
        "template": recipe.model.template,
        "batch_size": recipe.eval.batch_size,
        "limit": recipe.eval.limit,
    }


def files(recipe: Recipe) -> list[Path]:
    """The files with samples.

    Raises:
        RecipeError: as `chosen`; a kind that no evaluator has.
        DataError: a file is missing.
    """
    asked = chosen(recipe.eval)
    _by_evaluator(asked)
    _asks_server(recipe)
    return [file for one in asked for file in _files(one.dataset)]


def _files(dataset: EvalDataset) -> list[Path]:
    """A folder means all files in it."""
    if dataset.path is None:
        if kinds()[dataset.kind].needs_path:
            raise RecipeError(f"data set {dataset.name}: kind {dataset.kind} needs a path to its samples.")
        return []
    path = Path(dataset.path)
    if not path.exists():
        raise DataError(f"{path}: no such file. Correct the path of data set {dataset.name} in the recipe or suite.")
    if path.is_dir() != kinds()[dataset.kind].folder:
        wanted, found = ("a folder", "a file") if path.is_file() else ("a file", "a folder")
        raise DataError(f"{path}: kind {dataset.kind} needs {wanted}, and this is {found}. Correct the path of data set {dataset.name}.")
    found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    return sorted(file for file in found if file.is_file()) if path.is_dir() else [path]


STAGE = Stage(name="eval", version=3, run=run, settings=settings, files=files)
