"""What a run takes, stage by stage, before it starts: from the recipe, from what is made already, and from earlier runs in the store.

Every manifest keeps the `forecast` its stage began with and what it really took, so that forecasts can be judged, and learned from: the
seconds of the last run, times how much more there is to do now. What there is to do is the stage's `amount`: bytes to read for prepare,
operations for train, weights for base and convert, prompts times weights for eval and chat.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import Artifact, Store
from pipelines.pipeline import Node, Planned, plan
from pipelines.recipe import Recipe
from pipelines.suites import chosen
from pipelines.training_forecast import Machine, duration, measured_rate, model_of, packs_of, this_machine, tokens_of, warnings
from xtuner_core.config import TrainConfig
from xtuner_core.estimate import GIB, LIBRARIES, STATE, WIDTH, load_of, memory, operations_per_token, steps
from xtuner_core.models.sizes import Model, count

EXPORTED = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a weight in what is exported."""
LINES_READ = 1 << 20
"""Bytes of a file of questions from which its number of lines is told; a longer one is told by proportion."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a stage takes; None where that cannot be told."""

    seconds: float | None = None
    memory: float | None = None
    """Bytes at the peak: of one process of the training, on the device it computes on; of all processes of another stage."""
    disk: float | None = None
    """Bytes of the artifact."""
    scratch: float | None = None
    """Bytes on disk beside them while the stage runs."""
    steps: int | None = None
    tokens: int | None = None
    amount: float | None = None
    """What there is to do, in a unit of the stage's own."""
    parameters: int | None = None
    """Of the model."""
    trained: int | None = None


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One node of a run."""

    node: str
    state: Literal["cached", "will run", "depends"]
    figures: Figures
    """Of a cached stage: what it took when it was made."""
    learned_from: str | None = None
    """The artifact of an earlier run whose time is the measure."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run before it starts."""

    stages: tuple[StageForecast, ...]
    warnings: tuple[str, ...]
    """What will not fit this machine, or will be slow on it; a sentence each."""
    free: int
    """Bytes that the store's disk has left."""

    @property
    def to_come(self) -> tuple[StageForecast, ...]:
        """The stages that are not cached."""
        return tuple(stage for stage in self.stages if stage.state != "cached")

    @property
    def seconds(self) -> float:
        """Of all stages that are to come and of which it can be told."""
        return sum(stage.figures.seconds or 0 for stage in self.to_come)

    @property
    def disk(self) -> float:
        """Bytes at the worst moment: what the stages before it have left, and what one of them needs meanwhile."""
        left, worst = 0.0, 0.0
        for stage in self.to_come:
            left += stage.figures.disk or 0
            worst = max(worst, left + (stage.figures.scratch or 0))
        return worst


def forecast_of(recipe: Recipe, store: Store) -> Forecast:
    """What a run of the recipe would take now, on this machine; errors as those of `plan`."""
    return forecast(list(plan(recipe, store)), recipe, store, this_machine())


def forecast(planned: Sequence[Planned], recipe: Recipe, store: Store, machine: Machine) -> Forecast:
    """The same for a plan that is made already."""
    made = {step.node.name: step.artifact for step in planned if step.artifact}
    stages = tuple(_of_step(step, recipe, store, made, machine) for step in planned)
    told = Forecast(stages, (), shutil.disk_usage(_existing(store.root)).free)
    return Forecast(stages, tuple(_warnings(told, recipe, made, machine)), told.free)


def _of_step(step: Planned, recipe: Recipe, store: Store, made: Mapping[str, Artifact], machine: Machine) -> StageForecast:
    if step.artifact is not None:
        return StageForecast(step.node.name, "cached", actual(step.artifact))
    figures, learned_from = _expected(step.node, recipe, store, made, machine)
    return StageForecast(step.node.name, step.state, figures, learned_from)


def expected(node: Node, recipe: Recipe, store: Store, made: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the manifest of a stage that begins now keeps as `forecast`: its figures and `learned_from`."""
    figures, learned_from = _expected(node, recipe, store, made, this_machine())
    return asdict(figures) | {"learned_from": learned_from}


def actual(artifact: Artifact) -> Figures:
    """What making the artifact took."""
    manifest = artifact.manifest
    metrics, foretold = manifest["metrics"], manifest.get("forecast") or {}
    return Figures(
        seconds=manifest["seconds"],
        memory=metrics.get("peak_memory") or manifest.get("peak_memory"),
        disk=sum(file["bytes"] for file in manifest["files"]),
        steps=metrics.get("steps"),
        tokens=metrics.get("tokens"),
        amount=foretold.get("amount"),
        parameters=foretold.get("parameters"),
    )


def _expected(node: Node, recipe: Recipe, store: Store, made: Mapping[str, Artifact], machine: Machine) -> tuple[Figures, str | None]:
    model, packs = model_of(recipe, made.get("base")), packs_of(made.get("prepare"))
    before = _earlier(node, recipe, store)
    if node.stage.name == "train":
        return _training(recipe, store, model, packs, machine)
    parameters = count(model, recipe.train).total if model else None
    amount = _amount(node, recipe, parameters)
    if before is None:
        return Figures(None, _memory(node, recipe, parameters), _disk(node, recipe, model), amount=amount, parameters=parameters), None
    took = actual(before)
    more = _times(amount, took.amount)
    same_size = took.memory if parameters == took.parameters else None
    return Figures(
        seconds=more and took.seconds and took.seconds * more,
        memory=same_size or _memory(node, recipe, parameters),
        disk=_disk(node, recipe, model) or (more and took.disk and took.disk * more),
        amount=amount,
        parameters=parameters,
    ), f"{before.path.parent.name}/{before.path.name}" if more else None


def _earlier(node: Node, recipe: Recipe, store: Store) -> Artifact | None:
    """The last one of the stage, of this recipe if there is one."""
    recent = store.recent(node.stage.name)
    return next((one for one in recent if one.manifest["recipe"] == recipe.name), recent[0] if recent else None)


def _times(now: float | None, before: float | None) -> float | None:
    return now / before if now and before else None


def _amount(node: Node, recipe: Recipe, parameters: int | None) -> float | None:
    match node.stage.name:
        case "prepare":
            return sum(file.stat().st_size for file in node.stage.files(recipe))
        case "eval":
            return parameters and parameters * _asked(recipe)
        case "chat":
            smoke = len(node.stage.settings(recipe)["smoke"])
            return parameters and parameters * (smoke + sum(min(recipe.chat.count, _lines(file)) for file in node.stage.files(recipe)))
        case "verdict":
            return _asked(recipe)
        case _:
            return parameters


def _asked(recipe: Recipe) -> int:
    """Prompts of an evaluation; a folder's sets, whose numbers only OpenCompass knows, count by their lines."""
    paths = [Path(one.dataset.path) for one in chosen(recipe.eval) if one.dataset.path]
    counts = [sum(map(_lines, path.rglob("*.jsonl"))) if path.is_dir() else _lines(path) for path in paths]
    return sum(min(number, recipe.eval.limit or number) for number in counts)


def _lines(file: Path) -> int:
    with open(file, "rb") as content:
        start = content.read(LINES_READ)
    lines = start.count(b"\n") + (not start.endswith(b"\n"))
    return max(1, round(lines * file.stat().st_size / len(start))) if start else 0


def _memory(node: Node, recipe: Recipe, parameters: int | None) -> float | None:
    """Of the stages that load the whole model once."""
    if parameters is None or node.stage.name not in ("eval", "chat"):
        return None
    return LIBRARIES["cpu"] + parameters * EXPORTED[recipe.convert.dtype]


def _disk(node: Node, recipe: Recipe, model: Model | None) -> float | None:
    if model is None or node.stage.name != "convert":
        return None
    parameters = count(model, recipe.train)
    return parameters.total * EXPORTED[recipe.convert.dtype] + (4 * parameters.trained if recipe.train.method != "full" else 0)


def _training(recipe: Recipe, store: Store, model: Model | None, packs: dict[str, Any], machine: Machine) -> tuple[Figures, str | None]:
    wanted = steps(recipe.train, packs.get("packs"))
    if model is None:
        return Figures(steps=wanted), None
    train, parameters = recipe.train, count(model, recipe.train)
    tokens = tokens_of(recipe, packs, wanted) if wanted else None
    operations = tokens / train.processes * operations_per_token(parameters) if tokens else None
    measured = measured_rate(store)
    return Figures(
        seconds=operations / measured[0] if operations and measured else None,
        memory=memory(model, train, load_of(train, recipe.data.pack_length, recipe.data.max_length, packs), machine.device).total,
        disk=WIDTH[train.weights] * parameters.trained,
        scratch=_checkpoints(train) * (WIDTH[train.weights] + STATE.get(train.optimizer, 8.0)) * parameters.trained,
        steps=wanted,
        tokens=round(tokens) if tokens else None,
        amount=operations,
        parameters=parameters.total,
        trained=parameters.trained,
    ), measured[1] if measured and operations else None


def _checkpoints(train: TrainConfig) -> int:
    """On disk at one time: those that are kept and the one that is being written; one where only a signal makes them."""
    regular = train.checkpoint_interval or train.checkpoint_minutes
    return (train.checkpoint_keep + 1 if regular else 1) + train.checkpoint_best


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _warnings(told: Forecast, recipe: Recipe, made: Mapping[str, Artifact], machine: Machine) -> Iterator[str]:
    training = next(stage for stage in told.stages if stage.node == "train")
    model, packs = model_of(recipe, made.get("base")), packs_of(made.get("prepare"))
    if training.state != "cached" and model:
        load = load_of(recipe.train, recipe.data.pack_length, recipe.data.max_length, packs)
        here = recipe.train.processes // recipe.launch.nodes
        yield from warnings(recipe.train, here, memory(model, recipe.train, load, machine.device), machine)
    for stage in told.to_come:
        if stage is not training and machine.device == "cpu" and (stage.figures.memory or 0) > machine.memory:
            yield f"{stage.node} needs {_gib(stage.figures.memory)}, more than the {machine.memory / GIB:.1f} GiB that this machine has."
    if told.disk > told.free:
        yield (
            f"the run needs about {size(told.disk)} of disk, and {size(told.free)} are free: remove what is not needed "
            "(xtuner cache gc), or lower train.checkpoint_keep."
        )


def lines(told: Forecast) -> Iterator[str]:
    """For a person: a line for each stage that is to come, all of it together, and the warnings."""
    for stage in told.to_come:
        if parts := list(_parts(stage.figures)):
            yield f"{stage.node:<15} {', '.join(parts)}{f' (by {stage.learned_from})' if stage.learned_from else ''}"
    if told.to_come:
        yield f"{'all':<15} {_time(told)}; {size(told.disk)} of the {size(told.free)} that are free on disk"
    yield from (f"warning: {warning}" for warning in told.warnings)


def _time(told: Forecast) -> str:
    untold = [stage.node for stage in told.to_come if stage.figures.seconds is None]
    if len(untold) == len(told.to_come):
        return "how long can be told after the first run here"
    return f"about {duration(told.seconds)}" + (f" and the time of {', '.join(untold)}, not known yet" if untold else "")


def _parts(figures: Figures) -> Iterator[str]:
    if figures.trained is not None and figures.parameters is not None:
        yield f"{figures.parameters / 1e6:.1f} M parameters, {figures.trained / 1e6:.1f} M trained"
    if figures.seconds is not None:
        yield f"about {duration(figures.seconds)}"
    if figures.steps is not None:
        yield f"{figures.steps} steps" + (f" of {figures.tokens / figures.steps:.0f} tokens" if figures.tokens else "")
    if figures.memory is not None:
        yield f"{_gib(figures.memory)} of memory" + (" a process" if figures.trained is not None else "")
    if figures.disk is not None:
        yield f"{size(figures.disk)} on disk" + (f", {size(figures.scratch)} more meanwhile" if figures.scratch else "")


def _gib(amount: float | None) -> str:
    return f"{(amount or 0) / GIB:.1f} GiB"


def size(amount: float) -> str:
    """`512 B`, `3.4 MB`, `12 GB`: bytes in powers of a thousand, as disks and `df -H` count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
