"""`WORK_DIR/.xtuner`: the runs of a work directory, in the form of XTuner V1's `XTunerMeta`, always whole.

{"exps": [{"exp_dir", "history": [{"begin", "timestamp", "git_info": {"commit", "staged", "unstaged"}, "end"?, "comment"?}],
           "checkpoint_list", "hf_checkpoint_list", "snap_checkpoint_list", "cur_step", "cur_epoch", "consumed_tokens",
           "consumed_samples"}]}

Steps are optimizer steps; `consumed_tokens` is rank 0's count times the processes, `consumed_samples` documents by their mean per pack.
A run that was killed has no `end`; what it did is read from its files when the next one begins.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xtuner_core.config import SftConfig
from xtuner_core.durable import write_bytes, write_json

RECORD = ".xtuner"
GIT_SECONDS = 10
Json = dict[str, Any]


def begin(config: SftConfig, processes: int) -> None:
    """Add a run that starts now from the newest checkpoint, or from nothing."""
    earlier, current = _read(config.work_dir)
    step = max((_number(folder) for folder in _checkpoints(config.work_dir)), default=0)
    run = {"begin": step, "timestamp": f"{datetime.now(UTC):%Y%m%d%H%M%S}", "git_info": git_info(config.work_dir, step)}
    _write(config, processes, earlier, [*(current["history"] if current else []), run])


def end(config: SftConfig, processes: int, comment: str) -> None:
    """Say where the run that `begin` added has stopped, and how."""
    earlier, current = _read(config.work_dir)
    if current:
        *before, run = current["history"]
        _write(config, processes, earlier, [*before, {**run, "end": _steps_done(config.work_dir), "comment": comment}])


def moved(work_dir: Path, aside: Path) -> None:
    """What was in the directory lies in `aside` now, a folder in it called `previous-…`."""
    earlier, current = _read(work_dir)
    if current:
        write_json(work_dir / RECORD, {"exps": [*earlier, _relocated(current, current["exp_dir"], str(aside))]})


def _relocated(exp: Json, before: str, after: str) -> Json:
    return json.loads(json.dumps({**exp, "exp_dir": after}).replace(json.dumps(before)[:-1] + "/", json.dumps(after)[:-1] + "/"))


def _read(work_dir: Path) -> tuple[list[Json], Json | None]:
    """The experiments that were put aside, and the one that the directory holds; a damaged record is begun anew, for it decides nothing."""
    try:
        exps = json.loads((work_dir / RECORD).read_text(encoding="utf-8"))["exps"]
        here = bool(exps) and not Path(exps[-1]["exp_dir"]).name.startswith("previous-")
        return (exps[:-1], exps[-1]) if here else (exps, None)
    except (OSError, ValueError, KeyError, TypeError):
        return [], None


def _write(config: SftConfig, processes: int, earlier: list[Json], history: list[Json]) -> None:
    exp = {"exp_dir": str(config.work_dir), "history": history, **_consumed(config, processes)}
    write_json(config.work_dir / RECORD, {"exps": [*earlier, exp]})


def _consumed(config: SftConfig, processes: int) -> Json:
    step = _steps_done(config.work_dir)
    tokens = sum(row["text_tokens"] for row in _rows(config.work_dir).values())
    data = json.loads((config.data_dir / "data.json").read_text(encoding="utf-8"))
    packs = step * config.train.global_batch_size
    documents = data["documents"] - data.get("validation_documents", 0)
    return {
        "checkpoint_list": [str(folder) for folder in _checkpoints(config.work_dir)],
        "hf_checkpoint_list": [],
        "snap_checkpoint_list": [],
        "cur_step": step,
        "cur_epoch": packs // max(1, data["packs"]),
        "consumed_tokens": int(tokens * processes),
        "consumed_samples": round(packs * documents / max(1, data["packs"])),
    }


def _rows(work_dir: Path) -> dict[int, Json]:
    """The metrics by step; what comes after the checkpoint of a resumed run is what that run did."""
    file = work_dir / "metrics.jsonl"
    rows: list[Json] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # the last one, torn when the run was killed
            row = json.loads(line)
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
    return {row["step"]: row for row in rows}


def _steps_done(work_dir: Path) -> int:
    return max(_rows(work_dir), default=0)


def _checkpoints(work_dir: Path) -> list[Path]:
    return sorted((work_dir / "checkpoints").glob("step-*"), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def git_info(work_dir: Path, step: int) -> Json:
    """Commit of the engine's source, and the files with what was changed but not committed; None where there is no repository."""
    commit = _git("rev-parse", "HEAD")
    info: Json = {"commit": commit.decode().strip() if commit else None, "staged": None, "unstaged": None}
    for name, options in (("staged", ["--cached"]), ("unstaged", [])):
        if difference := _git("diff", *options):
            file = work_dir / f"git-info-begin-{step}" / f"{name}.diff"
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, difference)
            info[name] = str(file)
    return info


def _git(*arguments: str) -> bytes | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, timeout=GIT_SECONDS, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
