"""A run's work directory: one run at a time, and never two different ones in turn without being told.

WORK_DIR/run.json          what decided the run: model, data, settings; and where the model was found
         prepared/         model-KEY/, data-KEY/, shards/: made once, found again by what decides them
         checkpoints/ final/ metrics.jsonl validation.jsonl outcome.json
         samples.jsonl profile/ tensorboard/ wandb/ mlflow/ trackio/
                           if they were asked for; trackers/ has the names of the services' runs
         .xtuner git-info-begin-STEP/
                           the runs so far (xtuner_core/run_record.py)
         previous-TIME/    what `--no-resume` put aside
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from xtuner_core.config import OBSERVING, TrainConfig
from xtuner_core.digest import sha256
from xtuner_core.durable import sync_directory, write_json
from xtuner_core.errors import DataError, RecipeError

Facts = dict[str, Any]
FACTS = "run.json"
PREPARED = "prepared"
RESULTS = (
    "checkpoints", "final", "metrics.jsonl", "validation.jsonl", "samples.jsonl", "profile", "outcome.json", "git-info-begin-*", FACTS,
    "trackers", "tensorboard", "wandb", "mlflow", "trackio",
)  # fmt: skip
"""What a run leaves; the rest can be made again."""
_PLACEMENT = {"processes", "fsdp", "recompute", "recompute_ratio", "activation_offload", "compile"}
"""Train settings that say where and when the same numbers are computed."""
FREE = OBSERVING | _PLACEMENT | {
    "epochs", "total_step", "lr", "lr_min", "scheduler", "warmup_ratio", "decay_ratio", "weight_decay", "max_grad_norm", "loss_chunk",
    "skip_grad_norm_factor", "skip_grad_norm_window", "max_skipped_steps", "validation_interval",
    "checkpoint_best", "early_stop",
}  # fmt: skip
"""Train settings that may change between a checkpoint and the run that continues it; what is saved keeps its meaning."""

UNSEEN = OBSERVING | _PLACEMENT | {"validation_interval"}
"""Train settings that may change once the result is there, unless it depends on the validation loss."""


def claim(work_dir: Path) -> FileLock:
    """Hold the directory for this process; the kernel lets go when it ends, however that happens.

    Raises:
        RecipeError: another run holds it.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"{work_dir}: another run is at work there. Wait for it, or choose another --work-dir.") from None
    return lock


def put_aside(work_dir: Path) -> Path | None:
    """Move what an earlier run left to `previous-TIME`; None if there was nothing."""
    found = [path for name in RESULTS for path in work_dir.glob(name)]
    if not found:
        return None
    target = work_dir / f"previous-{datetime.now():%Y%m%d-%H%M%S-%f}"
    target.mkdir()
    for path in found:
        os.rename(path, target / path.name)
    sync_directory(work_dir)
    return target


def has_progress(work_dir: Path) -> bool:
    """Whether a checkpoint or a result is there."""
    return any((work_dir / "checkpoints").glob("step-*")) or (work_dir / "final").is_dir()


def earlier_facts(work_dir: Path) -> Facts | None:
    """What decided the run that is in the directory; None if there is none.

    Raises:
        DataError: the file is damaged, or missing beside checkpoints.
    """
    file = work_dir / FACTS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and "data" in facts:
            return facts
        what = "not what a run writes"
    except FileNotFoundError:
        if not has_progress(work_dir):
            return None
        what = "missing"
    except ValueError as error:
        what = f"damaged ({error})"
    raise DataError(f"{file}: {what}, so nobody can tell what the checkpoints belong to. Start over: --no-resume.")


def require_same_run(work_dir: Path, earlier: Facts, facts: Facts, say: Callable[[str], None]) -> None:
    """Refuse to continue a checkpoint with another model or other data; settings that may change are told.

    Raises:
        DataError: a data file is not the one that was trained on.
        RecipeError: something else differs.
    """
    way_out = f"{work_dir} holds a run that began otherwise. Undo the change, choose another --work-dir, or start over with --no-resume."
    if files := _changed_files(earlier["data"]["files"], facts["data"]["files"]):
        raise DataError(f"the data changed since the checkpoint: {'; '.join(files)}. {way_out}")
    before, now = (
        _flat({**one, "data": {**one["data"], "files": _uses(one)}, "model": _content(one["model"])}) for one in (earlier, facts)
    )
    changed = (name for name in before if name in now and before[name] != now[name])  # a field may be new in this version
    changes = {name: f"{name}: {_short(before[name])} → {_short(now[name])}" for name in changed}
    free = {name for name in changes if name.removeprefix("train.").split(".")[0] in FREE}
    if hard := [changes[name] for name in changes if name not in free]:
        raise RecipeError(f"changed since the checkpoint: {'; '.join(sorted(hard))}. {way_out}")
    for name in sorted(free):
        say(f"changed since the run began: {changes[name]}")


def _changed_files(before: list[Facts], now: list[Facts]) -> list[str]:
    if [one["sha256"] for one in before] == [one["sha256"] for one in now]:
        return []
    old, new = ({one["file"]: one["sha256"] for one in files} for files in (before, now))
    told = [f"{file} has other bytes" for file in new if file in old and old[file] != new[file]]
    told += [f"{file} was not there" for file in new if file not in old] + [f"{file} is gone" for file in old if file not in new]
    return told or ["the files come in another order"]


def _uses(facts: Facts) -> list[Facts]:
    """How each file is used, wherever it lies."""
    every = {"draw": 0}  # new in this version
    return [{name: {**every, **one}[name] for name in ("format", "ratio", "draw", "validation")} for one in facts["data"]["files"]]


def _content(model: Facts) -> Facts:
    """What the model is, not where it lies or when it was copied."""
    return {name: entry["sha256"] for name, entry in model.items()}


def _flat(tree: Any, path: str = "") -> Facts:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{path}.{name}" if path else name).items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def model_facts(folder: Path, earlier: Facts | None) -> Facts:
    """Each file of the model with bytes, time stamp and sha256; a file whose bytes and stamp are as before is not read again."""
    from xtuner_core.checkpoint.hf import weight_files

    known = (earlier or {}).get("model", {})
    return {file.name: _file_facts(file, known.get(file.name)) for file in [folder / "config.json", *weight_files(folder)]}


def _file_facts(file: Path, known: Facts | None) -> Facts:
    status = file.stat()
    seen = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and {name: known[name] for name in seen} == seen:
        return known
    return {**seen, "sha256": sha256(file)}


def start_digest(train: TrainConfig) -> str | None:
    """What stands for the content of `train.start`; None without it.

    Raises:
        DataError: there is no checkpoint in the folder.
    """
    if train.start is None:
        return None
    from xtuner_core.checkpoint import store

    try:
        return store.facts(Path(train.start))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"train.start {train.start}: no {store.FACTS} of a run's result is there. Name its folder `final`.") from None


def is_complete(work_dir: Path, train: TrainConfig, seed: int) -> bool:
    """Whether the directory has the whole result of a run with these settings."""
    from xtuner_core.checkpoint import store

    final = work_dir / "final"
    if not final.is_dir() or not store.is_whole(final):
        return False
    told = store.facts(final)
    every = TrainConfig().model_dump(mode="json")  # a field may be new in this version
    before, now = (_deciding(settings) for settings in (every | told["train"], train.model_dump(mode="json")))
    return told["seed"] == seed and before == now


def _deciding(settings: Facts) -> Facts:
    unseen = UNSEEN - {"validation_interval"} if settings.get("checkpoint_best") or settings.get("early_stop") else UNSEEN
    return {name: value for name, value in settings.items() if name not in unseen | {"start"}}  # which `require_same_run` compares


def write_facts(work_dir: Path, facts: Facts) -> None:
    """Keep what decided the run."""
    write_json(work_dir / FACTS, facts)
