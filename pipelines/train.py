"""Stage train: the engine as a torchrun subprocess, followed, interruptible, resumable."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from pipelines import launchers
from pipelines.launch import Job
from pipelines.pictures import loss_curve
from pipelines.processes import child, follow, tail
from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Metrics, Stage, Work
from pipelines.training_log import relayed
from xtuner_core import registry
from xtuner_core.config import PROMPT_FILES, SftConfig, TrainConfig
from xtuner_core.determinism import switches
from xtuner_core.digest import library_version
from xtuner_core.durable import remove, write_json
from xtuner_core.errors import BUG, DataError, Interrupted, UserError, from_exit_code

GRACE_SECONDS = 25
"""Longer than the launcher's own shutdown, shorter than Prefect's 30 s."""
_KILLED = "Signal 9 (SIGKILL)"
"""What torchrun says of a rank that was killed."""


WATCHED = ("metrics.jsonl", "validation.jsonl", "samples.jsonl", "profile", "tensorboard", "wandb", "mlflow", "trackio")
"""What the engine leaves for people to look at; all but the first only if the recipe or the data ask for it."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Train; payload: `checkpoint/` with the trained tensors, `training.json` with figures; record: the log, metrics, the loss curve.

    Raises:
        UserError: what the engine reported in its outcome file, or that it died without one.
    """
    launcher = registry.find(launchers, recipe.train.launcher)
    config = SftConfig(
        model_dir=work.inputs["base"] / "model",
        data_dir=work.inputs["data"],
        work_dir=work.scratch,
        seed=recipe.seed,
        train=with_places(recipe.train),
    )
    config_file = work.record / "config.json"
    write_json(config_file, config.model_dump(mode="json"))
    outcome = work.scratch / "outcome.json"
    remove(outcome)
    log_file = work.record / "train.log"
    job = Job(config_file, log_file, recipe.train.processes, recipe.launch)
    command = launcher.command(job)
    work.log(f"the whole log: {log_file}; {launcher.described(job)}")
    with relayed(work) as on_line, child(command, log_file, launcher.environment(job), GRACE_SECONDS) as running:
        status = follow(running, on_line)
    if status != 0:
        raise _failure(outcome, status, log_file, job.launch.nodes)
    remove(work.payload / "checkpoint")  # an attempt may have been killed just before it was published
    os.rename(work.scratch / "final", work.payload / "checkpoint")
    for name in WATCHED:
        if (work.scratch / name).is_dir():
            shutil.copytree(work.scratch / name, work.record / name, dirs_exist_ok=True, ignore_dangling_symlinks=True)  # wandb's
        elif (work.scratch / name).exists():
            shutil.copyfile(work.scratch / name, work.record / name)
    metrics = {**_summary(work.record), **_validation(work.record), **_told(work.payload / "checkpoint" / "checkpoint.json")}
    write_json(work.payload / "training.json", {name: value for name, value in metrics.items() if name != "tokens_per_second"})
    return metrics


def with_places(settings: TrainConfig) -> TrainConfig:
    """The settings with the places of what a recipe names as other files; the engine knows its working directory only."""
    prompts = (str(resolve_path(prompt)) if prompt.endswith(PROMPT_FILES) else prompt for prompt in settings.sample_prompts)
    start = str(resolve_path(settings.start)) if settings.start else None
    return settings.model_copy(update={"sample_prompts": tuple(prompts), "start": start})


def start_files(recipe: Recipe) -> list[Path]:
    """The checkpoint that training begins with; its content decides, not its place.

    Raises:
        DataError: the folder holds none.
    """
    if recipe.train.start is None:
        return []
    folder = resolve_path(recipe.train.start)
    files = [folder / "checkpoint.json", *sorted((folder / "tensors").glob("*"))]
    if not files[0].is_file():
        raise DataError(f"train.start {folder}: no checkpoint.json is there. Name payload/checkpoint of an artifact of stage train.")
    return files


def _failure(outcome: Path, status: int, log_file: Path, nodes: int) -> UserError:
    try:
        told = json.loads(outcome.read_text(encoding="utf-8"))
        return from_exit_code(told["code"], f"training: {told['message']}")
    except (OSError, ValueError, KeyError):
        told = f"training ended with status {status} and no outcome. The end of {log_file}:\n{tail(log_file, 25)}"
        if nodes > 1:
            return Interrupted(f"{told}\nA machine was lost, or did not come in time; run the same command again to continue.")
        if status == -signal.SIGKILL or _KILLED in told:
            return Interrupted(f"{told}\nA process of it was killed, perhaps for want of memory; run the same command again to continue.")
        return from_exit_code(BUG, told)


def _summary(record: Path) -> Metrics:
    rows = [json.loads(line) for line in (record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_step = {row["step"]: row for row in rows}  # a resumed run repeats the steps after its checkpoint
    steps = sorted(by_step)
    finite = [step for step in steps if _finite(by_step[step]["total_loss"])]  # another may have been left out of the training
    losses = [by_step[step]["total_loss"] for step in finite]
    loss_curve(finite, losses, record / "loss.png")
    tokens = sum(by_step[step]["text_tokens"] for step in steps)
    seconds = sum(by_step[step]["time"] + by_step[step]["data_time"] for step in steps)
    return {"steps": len(steps), "first_loss": losses[0], "last_loss": losses[-1], "tokens": tokens, "tokens_per_second": tokens / seconds}


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _validation(record: Path) -> Metrics:
    file = record / "validation.jsonl"
    if not file.exists():
        return {}
    return {"validation_loss": json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["validation_loss"]}


def _told(facts: Path) -> Metrics:
    """Number of steps that changed nothing, if the recipe allows any; which step's weights are the result, if not the last one's."""
    told = json.loads(facts.read_text(encoding="utf-8"))
    names = {"skipped_steps": "skipped_steps", "best_step": "best_step", "best_loss": "validation_loss"}
    return {shown: told[name] for name, shown in names.items() if name in told}


def _settings(recipe: Recipe) -> dict[str, Any]:
    # The quantized base is not in the checkpoint, but what it was rounded to decides what the adapter learns.
    quantizer = {"bitsandbytes": library_version("bitsandbytes")} if recipe.train.method == "qlora" else {}
    return {**quantizer, **switches().facts(), "train": recipe.train.deciding(), "seed": recipe.seed}


STAGE = Stage(
    name="train",
    version=6,
    run=run,
    settings=_settings,
    files=start_files,
    libraries=("torch", "transformers", "peft", "numpy"),
    resumable=True,
)
