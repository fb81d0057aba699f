"""One, two and four real processes: the same losses on uneven data, however they share the model and whoever continues a run.

Launches, not runs, cost the time: a launch trains several configurations in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtuner_core import trainer
from xtuner_core.checkpoint.store import load_whole, newest
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import PackedDataset, write_description, write_documents, write_packs
from xtuner_core.data.loader import load_step
from xtuner_core.data.order import packs_of_step
from xtuner_core.data.pack import whole_documents
from xtuner_core.data.tokenize import Tokenized
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

pytestmark = pytest.mark.slow

PACKS, STEPS, BATCH, SEED = 12, 9, 4, 42
IN_TURN = Path(__file__).parents[1] / "adapters" / "train_in_turn.py"


def write_uneven(folder: Path, description: dict[str, Any]) -> Path:
    """Packs of 5 to 1000 tokens, every third without a learned token; each comes from an input file of its own."""
    chance = np.random.default_rng(0)
    counts = np.resize([1, 4, 2], PACKS)
    lengths = np.concatenate([chance.integers(5, 250 if pack % 2 else 12, count) for pack, count in enumerate(counts)])
    for pack, own in enumerate(np.split(lengths, np.cumsum(counts)[:-1])):
        words = [chance.permutation(20)[np.arange(length) % 20] + 97 for length in own]  # a word of 20 letters, repeated
        loss = np.concatenate([(np.arange(length) > 2) & (pack % 3 != 2) for length in own])
        write_documents(folder / "documents" / f"{pack:05}", [Tokenized(np.concatenate(words).astype(np.uint32), loss, own)])
    write_packs(folder / "packs", whole_documents(np.arange(len(lengths)), lengths, counts))
    write_description(folder, {**description, "pack_length": 1024})
    return folder


@pytest.fixture(scope="module")
def uneven(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_uneven(tmp_path_factory.mktemp("uneven"), json.loads((tiny_data / "data.json").read_text()))


def launch(processes: int, script: Path, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--shutdown-timeout=20"]
    places = {"PYTHONPATH": str(Path(trainer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command += [str(part) for part in (script, *arguments)]
    return subprocess.run(command, env={**os.environ, **places, **environment}, capture_output=True, text=True, timeout=300)


def train_in_turn(processes: int, *folders: Path, **environment: str) -> None:
    done = launch(processes, IN_TURN, *(folder / "config.json" for folder in folders), **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    return [json.loads(row)["total_loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def norms(folder: Path) -> list[float]:
    return [json.loads(row)["grad_norm"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


NewRun = Callable[..., Path]


@pytest.fixture(scope="module")
def new_run(uneven: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NewRun:
    """Fields of `train` → a folder with the run's `config.json` and, if one is given, the checkpoint that it goes on from."""

    def new(checkpoint: Path | None = None, **train: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        fields = {"total_step": STEPS, "global_batch_size": BATCH, "checkpoint_interval": 3, "lr": 1e-3, "dtype": "fp32", **train}
        places = {"model_dir": tiny_model_folder, "data_dir": uneven, "work_dir": folder, "seed": SEED}
        config = SftConfig.model_validate({**places, "train": fields})
        (folder / "config.json").write_text(config.model_dump_json())
        if checkpoint:
            shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
        return folder

    return new


@dataclass(frozen=True, slots=True)
class Runs:
    """Work directories: one process, two and two again, four, four as two copies of the model, and one that grew and shrank."""

    one: Path
    two: Path
    two_again: Path
    four: Path
    hybrid: Path
    third: dict[int, Path]
    """Processes → the folder of the run that trained a third of the steps on so many: 2, then 1, then 4."""


@pytest.fixture(scope="module")
def runs(new_run: NewRun, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    two = [new_run() for _ in range(2)]
    train_in_turn(2, *two, XTUNER_DETERMINISTIC="1")
    one, by_one = new_run(), new_run(two[0] / "checkpoints" / "step-3")
    train_in_turn(1, one, by_one)
    four, hybrid, by_four = new_run(), new_run(fsdp={"sharding_size": 2}), new_run(by_one / "checkpoints" / "step-6")
    train_in_turn(4, four, hybrid, by_four)
    return Runs(one, *two, four, hybrid, {2: two[0], 1: by_one, 4: by_four})


def assert_same(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_data_is_uneven(uneven: Path) -> None:
    dataset = PackedDataset(uneven)
    steps = [[load_step(dataset, step, BATCH, SEED, rank, 4) for rank in range(4)] for step in range(STEPS)]
    learned = [[sum(batch.learned for batch in batches) for batches in ranks] for ranks in steps]
    tokens = [[sum(batch.text_tokens for batch in batches) for batches in ranks] for ranks in steps]
    assert any(0 in step and max(step) > 0 for step in learned), "a rank without a learned token beside others that have some"
    assert max(max(step) / min(step) for step in tokens) > 50


@pytest.mark.parametrize("name", ["two", "four", "hybrid"])
def test_losses_and_gradients_do_not_depend_on_the_number_of_processes(runs: Runs, name: str) -> None:
    assert losses(runs.one)[-1] < 0.95 * losses(runs.one)[0]
    assert_same(losses(getattr(runs, name)), losses(runs.one))
    assert norms(getattr(runs, name)) == pytest.approx(norms(runs.one), rel=1e-3)


def test_two_processes_then_one_then_four_go_on_as_if_nothing_had_changed(runs: Runs) -> None:
    begun, continued, ended = losses(runs.third[2])[:3], losses(runs.third[1]), losses(runs.third[4])
    assert (len(continued), len(ended)) == (6, 3)
    assert_same(begun + continued[:3] + ended, losses(runs.one))


def test_two_runs_in_deterministic_mode_have_the_same_bytes(runs: Runs) -> None:
    assert losses(runs.two) == losses(runs.two_again)
    weights, others = load_whole(runs.two / "final"), load_whole(runs.two_again / "final")
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)


def test_a_rank_that_cannot_read_its_data_ends_all_with_its_error_and_the_next_run_goes_on(
    runs: Runs, new_run: NewRun, uneven: Path, tmp_path: Path, world: World, stop: StopRequest
) -> None:
    lost = Path(shutil.copytree(uneven, tmp_path / "lost"))  # what the second rank sees: a file that its third step needs went away
    file = lost / "documents" / f"{packs_of_step(PackedDataset(uneven), 2, BATCH, SEED)[1]:05}" / "ids.bin"
    file.unlink()
    folder = new_run(checkpoint_interval=1)
    shared = (folder / "config.json").read_text()
    for rank, data in enumerate((uneven, lost)):
        (folder / f"config-{rank}.json").write_text(shared.replace(str(uneven), str(data)))
    done = launch(2, Path(__file__).with_name("own_config.py"), folder)
    assert done.returncode == 1
    assert time.time() - (folder / "metrics.jsonl").stat().st_mtime < 60, "after its last step"
    told = f"{file}: No such file or directory"
    assert f"error: {told}" in done.stderr
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["code"] == 74 and outcome["message"].startswith(told)
    kept = newest(folder)
    assert len(losses(folder)) == 2 and kept and kept.name in ("step-1", "step-2")
    (folder / "metrics.jsonl").unlink()
    trainer.train(SftConfig.model_validate_json(shared), world, stop)
    assert_same(losses(folder), losses(runs.one)[int(kept.name[5:]) :])


def test_why_rank_0_cannot_save_is_told_by_every_rank(tmp_path: Path) -> None:
    """Any of them may be the last to write `outcome.json`."""
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    done = launch(2, Path(__file__).with_name("save_in_vain.py"), tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert done.stdout.count(f"on {rank}: {tmp_path}/checkpoints/.step-1.draft: Not a directory. Check the path") == 2
