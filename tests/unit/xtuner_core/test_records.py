"""What a run leaves to look at: log lines, rows, trackers; and that none of it can end or change a training."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xtuner_core import trackers, trainer
from xtuner_core.checkpoint import store
from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.errors import RecipeError
from xtuner_core.metrics import ValidationMetrics
from xtuner_core.parallel.mesh import World
from xtuner_core.preparation import require_known_words
from xtuner_core.records import open_records
from xtuner_core.run_config import RunConfig
from xtuner_core.signals import StopRequest

LOG_LINE = r"\[XTuner\]\[RANK 0\]\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]\[INFO\] "

FAILING = """
PACKAGE = "json"

class Failing:
    def log(self, step, values):
        if step == 2:
            raise ConnectionError("the server is gone")
        print("told", step)

    def close(self):
        raise OSError("no way to close")

def open_tracker(work_dir, settings, first_step):
    if settings["seed"] == 1:
        raise ConnectionError("no server")
    return Failing()
"""


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tracker that fails at step 2 and when it is closed, and cannot be opened for seed 1."""
    folder = tmp_path / "more-trackers"
    folder.mkdir()
    (folder / "failing.py").write_text(FAILING)
    monkeypatch.setattr(trackers, "__path__", [*trackers.__path__, str(folder)])
    importlib.invalidate_caches()
    yield "failing"
    sys.modules.pop("xtuner_core.trackers.failing", None)


def test_a_step_s_row(world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path) -> None:
    trainer.train(sft_config(total_step=2, peak_flops=1e12), world, stop)
    told = rows(tmp_path)
    assert [row["step"] for row in told] == [1, 2]
    for row in told:
        assert 0 < row["learned_tokens"] < row["text_tokens"]
        assert 0 < row["efficient_attn_ratio"] < 1 and 0 < row["mfu"] < 1
    assert told[1]["consumed_tokens"] == told[0]["text_tokens"] + told[1]["text_tokens"]


@pytest.mark.parametrize("torn", [30, -1])
def test_a_torn_row_does_not_spoil_the_next_one(
    torn: int, world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    trainer.train(sft_config(total_step=2, checkpoint_interval=1), world, stop)
    file = tmp_path / "metrics.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second[:torn])  # the disk was full, or the power went
    trainer.train(sft_config(total_step=3), world, stop)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_without_a_known_best_there_is_no_mfu(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(sft_config(total_step=1), world, stop)
    [row] = rows(tmp_path)
    assert row["mfu"] is None
    [line] = [line for line in capsys.readouterr().out.splitlines() if " Step " in line]
    assert re.fullmatch(LOG_LINE + r"Step 1/1 data_time: .* e2e_tgs: [\d.]+", line)
    assert "mfu" not in line.lower()


def test_tensorboard_shows_each_step_once_after_a_resumption(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    config = sft_config(total_step=4, trackers="tensorboard", checkpoint_interval=2)
    trainer.train(config, world, stop)
    for newer in [tmp_path / "final", *(tmp_path / "checkpoints").glob("step-[34]")]:  # as if it had been killed after step 3 or 4
        if newer.exists():
            newer.rename(tmp_path / f"gone-{newer.name}")
    trainer.train(config, world, stop)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("loss/total_loss")
    told = {row["step"]: row["total_loss"] for row in rows(tmp_path)}
    assert [one.step for one in losses] == [1, 2, 3, 4]
    assert [one.value for one in losses] == pytest.approx([told[step] for step in (1, 2, 3, 4)])
    assert {"lr", "time/step_time", "runtime_info/tgs", "memory/max_memory_GB"} <= set(events.Tags()["scalars"])
    assert len(rows(tmp_path)) == 6 and rows(tmp_path)[-1]["consumed_tokens"] == sum(row["text_tokens"] for row in rows(tmp_path)[:4])


def test_a_measurement_is_a_line_and_a_tracker_s(
    world: World, sft_config: Callable[..., SftConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    config = sft_config(trackers="tensorboard")
    with open_records(config, 4, 9, PackedDataset(config.data_dir), world) as records:
        records.validation(ValidationMetrics(step=4, validation_loss=2.0, learned_tokens=30, time=0.5))
    assert re.fullmatch(LOG_LINE + r"Validation step 4 loss: 2\.000 perplexity: 7\.389\n", capsys.readouterr().out)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [event] = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/validation_loss")
    assert (event.step, event.value) == (4, 2.0)


def test_a_tracker_that_fails_does_not_end_the_run(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], failing: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trainer.train(sft_config(total_step=4, trackers=failing), world, stop)
    out = capsys.readouterr().out
    assert out.count("told 1") == 1 and out.count("the server is gone") == 1 and "failing failed at step 2" in out
    assert "could not be closed: OSError('no way to close')" in out
    assert store.is_whole(tmp_path / "final") and len(rows(tmp_path)) == 4


def test_a_tracker_that_cannot_be_opened_is_left_out(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(sft_config(total_step=1, trackers=failing).model_copy(update={"seed": 1}), world, stop)
    assert "failing could not be opened and is left out: ConnectionError('no server')" in capsys.readouterr().out


def test_a_tracker_without_its_package_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtuner_core.trackers.tensorboard.PACKAGE", "nosuchpackage")
    run = RunConfig.model_validate({"data": {"train": "nosuch.jsonl"}, "train": {"trackers": "tensorboard"}})
    with pytest.raises(
        RecipeError, match=r"train.trackers: tensorboard needs a package that is not installed: pip install nosuchpackage\."
    ):
        require_known_words(run)
    unknown = run.model_copy(update={"train": TrainConfig(trackers=("tensorbord",))})
    with pytest.raises(RecipeError, match="'tensorbord' is not one of the trackers: mlflow, tensorboard, trackio, wandb"):
        require_known_words(unknown)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_other_trackers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:  # trackio reads its folder's place when it is imported
        pytest.skip(f"{name} is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    settings = {"train": {"lr": 1e-4, "targets": ["q", "v"]}, "seed": 1}
    for first in (0, 2):  # a run, and the one that goes on
        tracker = importlib.import_module(f"xtuner_core.trackers.{name}").open_tracker(tmp_path, settings, first)
        for step in (first + 1, first + 2, first + 3):
            tracker.log(step, {"lr": 1 / step, "loss/total_loss": 2 / step})
        tracker.close()
    assert (tmp_path / name).is_dir() and (tmp_path / "trackers" / name).is_file()
