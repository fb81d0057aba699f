"""The training that is to come: does it fit, how many steps, how long."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines import base_model
from pipelines.artifacts import Artifact, Store
from pipelines.recipe import Recipe
from xtuner_core.config import TrainConfig
from xtuner_core.errors import UserError
from xtuner_core.estimate import GIB, Memory, advice, operations_per_token
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


def model_of(recipe: Recipe, base: Artifact | None) -> Model | None:
    """The base model's sizes, None where they cannot be known before it is fetched."""
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


def packs_of(data: Artifact | None) -> dict[str, Any]:
    """The figures of the prepared data (`data.json`), none while it is not prepared."""
    return json.loads((data.payload / "data.json").read_text(encoding="utf-8")) if data else {}


def tokens_of(recipe: Recipe, packs: dict[str, Any], steps: int) -> float:
    """Tokens that so many steps train on, over all processes; full packs while the data is not prepared."""
    full = packs["tokens"] / packs["packs"] if packs.get("packs") else recipe.data.pack_length
    return steps * full * recipe.train.global_batch_size


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


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def warnings(train: TrainConfig, processes: int, needed: Memory, machine: Machine) -> Iterator[str]:
    """What will probably fail or be slow on this machine, which runs so many of the processes; others are taken to be like it."""
    cuda = machine.device == "cuda"
    there = machine.memory if cuda else machine.memory / processes
    if needed.total > there:
        what = "of a GPU here" if cuda else f"that this machine has{' for each process' if processes > 1 else ''}"
        yield (f"train needs {needed.told()}, more than the {there / GIB:.1f} GiB {what}. Try {'; '.join(advice(train, machine.device))}.")
    if processes > machine.processors:
        what = "GPUs; each process needs one" if cuda else "cores; more processes than cores only make training slower"
        asked = "train.processes is" if processes == train.processes else "train.processes for each of launch.nodes are"
        yield f"{asked} {processes}, and this machine has {machine.processors} {what}."
