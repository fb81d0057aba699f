"""kill -9 and signals at chosen instants of a real run, again and again in one work directory: it ends with the bytes of one left alone.

The instants are found by watching the work directory from outside: what is seen is frozen (SIGSTOP), looked at again, and killed.
Runs come from a server that has imported the engine already; torchrun's part in a death is what test_training.py is about.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.recipe import PROJECT
from xtuner_core.checkpoint.store import published, step_of
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import VALIDATION, PackedDataset, write_packs
from xtuner_core.data.pack import whole_documents
from xtuner_core.durable import write_json

pytestmark = pytest.mark.slow

TRAIN = {
    "total_step": 6, "lr": 5e-3, "global_batch_size": 4, "checkpoint_interval": 1, "checkpoint_keep": 9, "validation_interval": 1,
    "checkpoint_best": True,
}  # fmt: skip
BULK = 20_000
FULL = {"method": "full"}
LORA = {"method": "lora", "lora": {"rank": 8, "dropout": 0.1}}
_SERVER = multiprocessing.get_context("forkserver")


def rank_main(rank: int, size: int, port: int, file: Path) -> None:
    """One rank, as torchrun starts it."""
    from xtuner_core import sft

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = os.open(file.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    raise SystemExit(sft.main(["--config", str(file)]))


Instant = Callable[["Run"], bool]
NewRun = Callable[..., Any]


@dataclass
class Run:
    """One work directory, in which a run is started and killed."""

    config: SftConfig
    ranks: list[BaseProcess] = field(default_factory=list)
    said: int = 0

    @property
    def folder(self) -> Path:
        return self.config.work_dir

    def keep(self, count: int) -> None:
        train = self.config.train.model_copy(update={"checkpoint_keep": count})
        self.config = self.config.model_copy(update={"train": train})

    def start(self) -> None:
        write_json(self.folder / "config.json", self.config.model_dump(mode="json"))
        self.said = len(self.log()) if (self.folder / "log").exists() else 0
        size = self.config.train.processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [(rank, size, port, self.folder / "config.json") for rank in range(size)]
        self.ranks = [_SERVER.Process(target=rank_main, args=one) for one in arguments]
        for rank in self.ranks:
            rank.start()

    def send(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.is_alive() and rank.pid:
                os.kill(rank.pid, number)

    def freeze_when(self, instant: Instant, seconds: float = 150) -> None:
        """Wait until the run is at that instant, and hold it there."""
        deadline = time.monotonic() + seconds
        while True:
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in self.ranks), self.log()[-3000:]
            if instant(self):
                self.send(signal.SIGSTOP)
                wait_frozen(self.ranks)
                if instant(self):
                    return
                self.send(signal.SIGCONT)
            time.sleep(0.0005)

    def end(self, number: signal.Signals, seconds: float) -> set[int | None]:
        """Send the held ranks a signal; their exit codes."""
        self.send(number)
        self.send(signal.SIGCONT)
        for rank in self.ranks:
            rank.join(seconds)
        return {rank.exitcode for rank in self.ranks}

    def finish(self) -> None:
        self.start()
        for rank in self.ranks:
            rank.join(120)
        assert [rank.exitcode for rank in self.ranks] == [0] * len(self.ranks), self.log()[-3000:]

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def final(self) -> dict[str, bytes]:
        folder = self.folder / "final"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_frozen(ranks: list[BaseProcess]) -> None:
    """A signal is on its way for a moment."""
    while any(psutil.Process(rank.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) for rank in ranks):
        time.sleep(0)


# The instants ----------------------------------------------------------------------------------------------------------------------


def after_the_first_step(run: Run) -> bool:
    return last_step(run, "metrics.jsonl") == 1


def a_draft_is_half_written(run: Run) -> bool:
    """Its tensors are begun, and nothing that makes it a checkpoint is there."""
    drafts = list((run.folder / "checkpoints").glob(".step-*.draft/tensors"))
    return any(not (draft.parent / "checkpoint.json").exists() for draft in drafts)


def an_old_one_is_being_removed(run: Run) -> bool:
    """The new one has its name, and of the oldest only a part is left (`bulky` makes that last for a moment)."""
    extra = run.folder / "checkpoints" / "step-0" / "extra"
    return extra.exists() and not all((extra / str(number)).exists() for number in range(0, BULK, BULK // 10)) and extra.exists()


def bulky(run: Run) -> None:
    """Put a checkpoint there that is older than any, of many files."""
    extra = run.folder / "checkpoints" / "step-0" / "extra"
    extra.mkdir(parents=True)
    for number in range(BULK):
        (extra / str(number)).touch()


def between_micro_batches(run: Run) -> bool:
    """A step is written, measured and saved, and the next one has been under way for a while."""
    before = last_step(run, "metrics.jsonl")
    time.sleep(0.02)
    saved = published(run.folder)
    return bool(saved) and step_of(saved[-1]) == before == last_step(run, "metrics.jsonl")


def during_a_validation(run: Run) -> bool:
    return last_step(run, "validation.jsonl") < last_step(run, "metrics.jsonl")


def the_model_is_loaded(run: Run) -> bool:
    return begun(run).count("Loading weights") > 0 and "Total trainable" not in begun(run)


def a_checkpoint_is_read(run: Run) -> bool:
    return "Total trainable" in begun(run) and "resumed from" not in begun(run)


def begun(run: Run) -> str:
    """The log since the run was started last."""
    return run.log()[run.said :] if (run.folder / "log").exists() else ""


def while_final_is_written(run: Run) -> bool:
    return (run.folder / ".final.draft").exists()


def last_step(run: Run, name: str) -> int:
    file = run.folder / name
    rows = file.read_text().splitlines() if file.exists() else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's data with a validation split."""
    folder = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("data") / "payload"))
    dataset = PackedDataset(folder)
    lengths = np.array([len(dataset.document(number).ids) for number in range(6)])
    write_packs(folder / VALIDATION, whole_documents(np.arange(6), lengths, np.array([2, 2, 2])))
    return folder


@pytest.fixture(scope="module")
def new_run(data: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Settings → a run in a work directory of its own; no process of it is left."""
    _SERVER.set_forkserver_preload(["xtuner_core.sft", "xtuner_core.trainer", "peft"])
    runs: list[Run] = []

    def new(**train: Any) -> Run:
        places = {"model_dir": tiny_model_folder, "data_dir": data, "work_dir": tmp_path_factory.mktemp("run")}
        runs.append(Run(SftConfig.model_validate({**places, "train": {**TRAIN, **train}})))
        return runs[-1]

    yield new
    for run in runs:
        run.send(signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(new_run: Callable[..., Run]) -> Callable[..., dict[str, bytes]]:
    """Settings → the final bytes of a run that nobody disturbs."""
    known: dict[str, dict[str, bytes]] = {}

    def final(**train: Any) -> dict[str, bytes]:
        name = json.dumps(train)
        if name not in known:
            run = new_run(**train)
            run.finish()
            known[name] = run.final()
        return known[name]

    return final


@pytest.mark.parametrize(
    ("method", "processes", "background", "instants"),
    [
        (FULL, 1, False, [a_draft_is_half_written, an_old_one_is_being_removed, while_final_is_written]),
        (FULL, 2, True, [after_the_first_step, a_draft_is_half_written]),
        (LORA, 1, True, [during_a_validation, a_draft_is_half_written]),
        (LORA, 2, False, [between_micro_batches, a_draft_is_half_written]),
    ],
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    method: dict[str, Any], processes: int, background: bool, instants: list[Instant], new_run: NewRun, undisturbed: NewRun
) -> None:
    run = new_run(**method, processes=processes, async_checkpoint=background)
    for instant in instants:
        if instant is an_old_one_is_being_removed:
            bulky(run)
            run.keep(1)
        run.start()
        run.freeze_when(instant)
        assert run.end(signal.SIGKILL, 10) == {-signal.SIGKILL}
        assert not (run.folder / "final").exists()
    run.finish()
    assert run.final() == undisturbed(**method, processes=processes)


@pytest.mark.parametrize(
    ("processes", "background", "number", "instants"),
    [
        (1, False, signal.SIGTERM, [the_model_is_loaded, between_micro_batches, a_checkpoint_is_read, a_draft_is_half_written]),
        (2, True, signal.SIGINT, [during_a_validation]),
    ],
)
def test_a_signal_in_any_phase_loses_no_step_and_the_run_ends_with_the_same_bytes(
    processes: int, background: bool, number: signal.Signals, instants: list[Instant], new_run: NewRun, undisturbed: NewRun
) -> None:
    run = new_run(**LORA, processes=processes, async_checkpoint=background)
    for instant in instants:
        run.start()
        run.freeze_when(instant)
        done = last_step(run, "metrics.jsonl")
        assert run.end(number, 30) == {75}, run.log()[-3000:]
        outcome = json.loads((run.folder / "outcome.json").read_text())
        assert outcome["code"] == 75 and "the same command continues" in outcome["message"]
        assert done <= (now := last_step(run, "metrics.jsonl")) <= done + 1
        assert [step_of(folder) for folder in published(run.folder)][-1:] == ([now] if now else [])
        assert not (run.folder / "final").exists()
    run.start()
    run.freeze_when(while_final_is_written)
    assert run.end(number, 30) == {0}  # what is being finished is the result itself
    assert run.final() == undisturbed(**LORA, processes=processes)


def test_a_signal_while_libraries_are_loaded_ends_the_run_soon(new_run: NewRun) -> None:
    run = new_run()
    file = run.folder / "config.json"
    write_json(file, run.config.model_dump(mode="json"))
    words = [sys.executable, "-m", "xtuner_core.sft", "--config", str(file)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)}) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + 60
        while "libtorch_cpu" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 75, told
    assert "stopped while the libraries were loaded; the same command continues from there." in told and "Traceback" not in told
