"""What `xtuner plan` says about the training that is to come: does it fit, how many steps, how long."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines import base_model
from pipelines.artifacts import Artifact, Store
from pipelines.recipe import Recipe
from xtuner_core.config import TrainConfig
from xtuner_core.errors import UserError
from xtuner_core.estimate import GIB, Memory, advice, load_of, memory, operations_per_token, steps
from xtuner_core.models.sizes import Model, count, model_of_config, model_of_folder

FIRST_STEPS = 2
"""Of an earlier run they do not count: caches fill, kernels are chosen."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What training has here: memory of the smallest GPU, or of the computer if there is none, in bytes; processors of either kind."""

    device: str
    memory: float
    processors: int


def this_machine() -> Machine:
    """Without importing torch: what the driver's own tool says of GPUs."""
    if gpus := _gpus():
        return Machine("cuda", min(gpus), len(gpus))
    import psutil

    return Machine("cpu", psutil.virtual_memory().total, len(os.sched_getaffinity(0)))


def _gpus() -> list[float]:
    """Memory of each GPU in bytes."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        return [float(line) * 2**20 for line in told.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def forecast(recipe: Recipe, store: Store, base: Artifact | None, data: Artifact | None, machine: Machine) -> Iterator[str]:
    """One line with parameters, memory, steps and time, as far as they can be known now; and warnings, a line each.

    `base` and `data` are the artifacts of the first two stages, where they are made already.
    """
    model = _model(recipe, base)
    if model is None:
        yield "train: memory and time can be told when the base model is there."
        return
    train, packs = recipe.train, _packs(data)
    parameters = count(model, train)
    needed = memory(model, train, load_of(train, recipe.data.pack_length, recipe.data.max_length, packs), machine.device)
    wanted = steps(train, packs.get("packs"))
    yield (
        f"train: {parameters.total / 1e6:.1f} M parameters, {parameters.trained / 1e6:.1f} M trained; "
        f"{needed.told()}; {_told(wanted)}{_time(recipe, store, model, packs, wanted)}"
    )
    yield from warnings(train, needed, machine)


def _told(wanted: int | None) -> str:
    return f"{wanted} steps" if wanted is not None else "steps can be told when the data is prepared"


def _model(recipe: Recipe, base: Artifact | None) -> Model | None:
    try:
        if base is not None:
            return model_of_folder(base.payload / "model")
        source = base_model.parse_base(recipe.model.base)
        if source.kind == "folder":
            return model_of_folder(source.path)
        if source.kind == "preset":
            [file] = base_model.files(recipe)
            return model_of_config(json.loads(file.read_text(encoding="utf-8")))
    except UserError:  # the stage itself tells what is wrong with the folder
        pass
    return None


def _packs(data: Artifact | None) -> dict[str, Any]:
    return json.loads((data.payload / "data.json").read_text(encoding="utf-8")) if data else {}


def _time(recipe: Recipe, store: Store, model: Model, packs: dict[str, Any], wanted: int | None) -> str:
    if wanted is None:
        return ""
    if (measured := measured_rate(store)) is None:
        return "; how long can be told after the first training here"
    rate, source = measured
    full = packs["tokens"] / packs["packs"] if packs.get("packs") else recipe.data.pack_length
    tokens = full * recipe.train.global_batch_size / recipe.train.processes
    seconds = wanted * tokens * operations_per_token(count(model, recipe.train)) / rate
    return f", about {_duration(seconds)} at the speed of {source} ({rate / 1e9:.0f} GFLOP/s a process)"


def measured_rate(store: Store) -> tuple[float, str] | None:
    """Operations a second of one process in the training that was made last, and its name; None if there is none to learn from."""
    last = store.newest("train")
    if last is None:
        return None
    try:
        config = json.loads((last.record / "config.json").read_text(encoding="utf-8"))
        model = model_of_folder(Path(config["model_dir"]))
        train = TrainConfig.model_validate(config["train"])
        rows = [json.loads(line) for line in (last.record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, ValidationError, UserError):  # of another version, or its base was removed
        return None
    counted = rows[FIRST_STEPS:] or rows
    seconds = sum(row["time"] + row["data_time"] for row in counted)
    if model is None or not seconds:
        return None
    operations = operations_per_token(count(model, train)) * sum(row["text_tokens"] for row in counted)
    return operations / seconds, f"train/{last.path.name}"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def warnings(train: TrainConfig, needed: Memory, machine: Machine) -> Sequence[str]:
    """What will probably fail or be slow on this machine."""
    cuda = machine.device == "cuda"
    there = machine.memory if cuda else machine.memory / train.processes
    told = []
    if needed.total > there:
        what = "of a GPU here" if cuda else f"that this machine has{' for each process' if train.processes > 1 else ''}"
        told.append(f"warning: that is more than the {there / GIB:.1f} GiB {what}. Try {'; '.join(advice(train, machine.device))}.")
    if train.processes > machine.processors:
        what = "GPUs; each process needs one" if cuda else "cores; more processes than cores only make training slower"
        told.append(f"warning: train.processes is {train.processes}, and this machine has {machine.processors} {what}.")
    return told
