"""Training under torchrun: after every kind of death as if nothing had happened.

(That one process and two train the same: tests/unit/xtuner_core/parallel/ and adapters/. A killed rank: also tests/chaos/.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.launch import Job
from pipelines.launchers import local
from xtuner_core.checkpoint.store import is_whole, newest
from xtuner_core.config import SftConfig
from xtuner_core.durable import write_json

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Run:
    """One work directory, in which a run can be started again and again."""

    config: SftConfig

    @property
    def folder(self) -> Path:
        return self.config.work_dir

    def start(self) -> subprocess.Popen[bytes]:
        """torchrun in a session of its own, as the train stage starts it."""
        write_json(self.folder / "config.json", self.config.model_dump(mode="json"))
        processes = self.config.train.processes
        job = Job(self.folder / "config.json", self.folder / "log", processes)
        environment = local.environment(job) | {"OMP_NUM_THREADS": "1"}
        command = local.command(job)
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def finish(self) -> None:
        status = self.start().wait(180)
        assert status == 0, (self.folder / "log").read_text()[-3000:]

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []

    def losses(self) -> list[float]:
        """Loss of each step; of a step that was repeated after a resume, the later one."""
        by_step = {row["step"]: row["total_loss"] for row in self.rows()}
        return [by_step[step] for step in sorted(by_step)]

    def wait_for_step(self, step: int, launcher: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while len(self.rows()) < step:
            assert launcher.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.01)

    def checkpoints(self) -> list[str]:
        return sorted((path.name for path in (self.folder / "checkpoints").glob("step-*")), key=lambda name: int(name[5:]))

    def digest(self) -> str:
        """sha256 over names and bytes of the final files: what the stages below are keyed by."""
        assert is_whole(self.folder / "final")
        every = hashlib.sha256()
        for path in sorted(path for path in (self.folder / "final").rglob("*") if path.is_file()):
            every.update(path.name.encode() + path.read_bytes())
        return every.hexdigest()


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children(recursive=True)


def wait_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes that are still there after so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


NewRun = Callable[..., Run]
STEPS, INTERVAL, KILLED_AFTER = 18, 5, 6
LORA = {"method": "lora", "lora": {"rank": 8, "dropout": 0.1}, "total_step": STEPS, "checkpoint_interval": INTERVAL, "processes": 2}


@pytest.fixture(scope="module")
def new_run(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Fields of `train` → a run in a work directory of its own, or in a copy of another's."""

    def new(folder: Path | None = None, **train: Any) -> Run:
        fields = {"lr": 5e-3, "global_batch_size": 2, **train}
        places = {"model_dir": tiny_model_folder, "data_dir": tiny_data, "work_dir": folder or tmp_path_factory.mktemp("run")}
        return Run(SftConfig.model_validate({**places, "train": fields}))

    return new


@pytest.fixture(scope="module")
def undisturbed(new_run: NewRun) -> Run:
    """LoRA with dropout on two processes, never interrupted; its two last checkpoints are kept."""
    run = new_run(**LORA)
    run.finish()
    return run


def copy_of(run: Run, tmp_path: Path) -> Path:
    """The work directory as it was before the last steps."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "final")
    (folder / "metrics.jsonl").unlink()
    return folder


def test_sigterm_to_the_launcher_saves_a_checkpoint_and_the_next_run_ends_with_the_same_bytes(new_run: NewRun, undisturbed: Run) -> None:
    run = new_run(**LORA)
    launcher = run.start()
    run.wait_for_step(KILLED_AFTER, launcher)
    ranks = ranks_of(launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0
    assert len(ranks) >= 2 and wait_gone(ranks, 10) == []
    last = newest(run.folder)
    assert last and last.name == run.checkpoints()[-1] == f"step-{len(run.rows())}"  # nothing that was trained is lost
    assert not (run.folder / "final").exists()
    outcome = json.loads((run.folder / "outcome.json").read_text())
    assert outcome["code"] == 75 and f"stopped after step {len(run.rows())} of {STEPS}" in outcome["message"]
    run.finish()
    assert run.digest() == undisturbed.digest()
    assert run.losses() == undisturbed.losses()
    assert len(run.rows()) == STEPS


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_kill_9_leaves_no_rank_alive_and_the_next_run_ends_with_the_same_bytes(new_run: NewRun, undisturbed: Run, victim: str) -> None:
    run = new_run(**LORA)
    launcher = run.start()
    run.wait_for_step(KILLED_AFTER, launcher)
    ranks = ranks_of(launcher)
    if victim == "rank":
        os.kill(ranks[-1].pid, signal.SIGKILL)
    else:
        os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.wait(60) != 0
    assert len(ranks) >= 2 and wait_gone(ranks, 60) == []
    last = newest(run.folder)
    assert last and INTERVAL <= int(last.name[5:]) < STEPS
    run.finish()
    assert f"resumed from {last.name}" in (run.folder / "log").read_text()
    assert run.digest() == undisturbed.digest()
    assert run.losses() == undisturbed.losses()


def test_a_flipped_byte_in_the_newest_checkpoint_means_the_one_before(new_run: NewRun, undisturbed: Run, tmp_path: Path) -> None:
    folder = copy_of(undisturbed, tmp_path)
    run = new_run(folder, **LORA)
    before, last = run.checkpoints()
    file = max((folder / "checkpoints" / last / "tensors").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 0x10
    file.write_bytes(raw)
    assert not is_whole(folder / "checkpoints" / last)
    run.finish()
    assert run.rows()[0]["step"] == int(before[5:]) + 1
    assert run.digest() == undisturbed.digest()


@pytest.mark.usefixtures("undisturbed")  # in the same worker as all that started one
def test_no_process_of_ours_is_left() -> None:
    running = list[str]()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # another test's, that ended
            running.append(" ".join(process.cmdline()))
    assert not [command for command in running if "xtuner_core.sft" in command and "multiprocessing.forkserver" not in command]
