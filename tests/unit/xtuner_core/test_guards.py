"""Which steps are left out, what is told about them, and that nothing of them reaches the weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtuner_core import trainer
from xtuner_core.checkpoint import store
from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.data.loader import Batch
from xtuner_core.errors import DataError, Interrupted
from xtuner_core.guards import History, is_outlier, judge
from xtuner_core.loss import packed_loss
from xtuner_core.parallel import shard
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

Configure = Callable[..., SftConfig]
STOP = TrainConfig()
SKIP = TrainConfig(skip_grad_norm_factor=3.0, skip_grad_norm_window=4, max_skipped_steps=2)
BROKEN = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 1.0)]
norms = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(("loss", "grad_norm"), BROKEN)
def test_without_the_rule_a_broken_number_ends_the_run(loss: float, grad_norm: float, world: World) -> None:
    assert judge(History(), 6, 0.0, 1e30, [3], STOP, world) == History()
    with pytest.raises(DataError, match=r"step 7: loss .*the weights were left unchanged\. Documents of the step: \[3, 5\]\. Look at"):
        judge(History(), 7, loss, grad_norm, [3, 5], STOP, world)


def test_without_the_rule_every_step_is_applied_also_after_one_that_was_left_out(world: World) -> None:
    assert judge(History((1.0,), 1, 1), 6, 1.0, 2.0, [3], STOP, world) == History((1.0,), 0, 1)


def test_a_message_does_not_name_thousands_of_documents(world: World) -> None:
    with pytest.raises(DataError, match=r"\[0, 1, .* 18, 19, … \(3000 in all\)\]\. Look"):
        judge(History(), 7, math.nan, 1.0, range(3000), STOP, world)


@pytest.mark.parametrize(("loss", "grad_norm"), BROKEN)
def test_with_the_rule_a_broken_number_is_left_out_from_the_first_step_on(loss: float, grad_norm: float, world: World) -> None:
    assert judge(History(), 1, loss, grad_norm, [3], SKIP, world) == History((), 1, 1)


@given(known=st.lists(norms, min_size=4, max_size=9), norm=norms)
def test_a_spike_is_above_the_factor_times_the_median_of_the_window(known: list[float], norm: float) -> None:
    assert is_outlier(History(tuple(known)), 1.0, norm, SKIP) == (norm > 3 * median(known[-4:]))
    assert not is_outlier(History(tuple(known[:3])), 1.0, norm, SKIP)  # too few to say


def test_a_spike_does_not_count_for_later_ones_and_an_applied_step_ends_the_row(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    history = History()
    for step, norm in enumerate([9.0, 1.0, 2.0, 3.0, 2.0], 1):
        history = judge(history, step, 1.0, norm, [step], SKIP, world)
    assert history == History((1.0, 2.0, 3.0, 2.0), 0, 0)
    history = judge(history, 6, 1.0, 6.5, [41, 42], SKIP, world)
    assert history == History((1.0, 2.0, 3.0, 2.0), 1, 1)
    assert (
        "left out step 6: loss 1.0, gradient norm 6.5; the weights were left unchanged. Documents of the step: [41, 42]."
        in capsys.readouterr().out
    )
    with pytest.raises(DataError, match=r"step 7: .*\[43\]\. 2 steps in a row were left out \(train\.max_skipped_steps\)"):
        judge(history, 7, 1.0, 6.5, [43], SKIP, world)
    assert judge(history, 7, 1.0, 6.0, [43], SKIP, world) == History((2.0, 3.0, 2.0, 6.0), 0, 1)


@given(history=st.builds(History, st.lists(norms).map(tuple), st.integers(0, 5), st.integers(0, 50)))
def test_a_checkpoint_keeps_the_history_exactly(history: History) -> None:
    assert History.of_checkpoint(json.loads(json.dumps({"step": 3, "history": asdict(history)}))) == history
    assert History.of_checkpoint({"step": 3}) == History()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on the loss of the n-th forward pass is multiplied with a factor."""

    def from_now_on(factors: dict[int, float]) -> None:
        passes: list[int] = []

        def poisoned(model: Any, batch: Batch, chunk: int) -> torch.Tensor:
            passes.append(1)
            return packed_loss(model, batch, chunk) * factors.get(len(passes), 1.0)

        monkeypatch.setattr(shard, "packed_loss", poisoned)

    return from_now_on


SKIPPING = {"skip_grad_norm_factor": 5.0, "skip_grad_norm_window": 2, "checkpoint_interval": 1, "lr": 1e-3}


@pytest.mark.parametrize(("optimizer", "factor"), [("adamw", math.nan), ("muon", 1e4)])
def test_a_step_that_is_left_out_changes_nothing(
    optimizer: str, factor: float, world: World, stop: StopRequest, sft_config: Configure, poison: Callable[..., None]
) -> None:
    config = sft_config(optimizer=optimizer, total_step=5, **SKIPPING)
    poison({3: factor})
    trainer.train(config, world, stop)
    folder = config.work_dir / "checkpoints" / "step-4"
    assert store.facts(folder)["history"]["skipped"] == store.facts(config.work_dir / "final")["skipped_steps"] == 1
    start_over(config)
    poison({3: factor})
    with pytest.raises(Interrupted):  # after the step that was left out
        interrupt_after(3, config, world, stop)
    before, after = (store.load_whole(config.work_dir / "checkpoints" / f"step-{step}") for step in (2, 3))
    kept = [name for name in before if not name.startswith("rng.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_a_checkpoint_before_the_first_update_changes_nothing(
    world: World, stop: StopRequest, sft_config: Configure, poison: Callable[..., None]
) -> None:
    finals = []
    for interval in (None, 1):
        config = sft_config(total_step=3, **{**SKIPPING, "checkpoint_interval": interval})
        poison({1: math.nan})
        trainer.train(config, world, stop)
        finals.append(store.load_whole(config.work_dir / "final"))
        shutil.rmtree(config.work_dir / "final")
    assert finals[0].keys() == finals[1].keys() and all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def start_over(config: SftConfig) -> None:
    for folder in ("checkpoints", "final"):
        shutil.rmtree(config.work_dir / folder)


def interrupt_after(step: int, config: SftConfig, world: World, stop: StopRequest) -> None:
    """Train, with a SIGTERM in this step."""
    train_step = trainer.train_step

    def interrupted(*arguments: Any) -> tuple[float, float, History]:
        if arguments[-1] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupted)
        trainer.train(config, world, stop)


def test_a_resumed_run_leaves_out_the_same_steps(
    world: World, stop: StopRequest, sft_config: Configure, poison: Callable[..., None]
) -> None:
    """The norms of the steps before the interruption decide about the one after it."""
    config = sft_config(total_step=4, **SKIPPING)
    poison({3: 1e4})
    trainer.train(config, world, stop)
    expected = store.load_whole(config.work_dir / "final")
    start_over(config)
    poison({})
    with pytest.raises(Interrupted):
        interrupt_after(2, config, world, stop)
    stop.asked = False
    poison({1: 1e4})
    trainer.train(config, world, stop)
    assert store.facts(config.work_dir / "final")["skipped_steps"] == 1
    found = store.load_whole(config.work_dir / "final")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_that_learned_nothing_is_an_error(
    world: World, stop: StopRequest, sft_config: Configure, poison: Callable[..., None]
) -> None:
    poison({1: math.nan})
    config = sft_config(total_step=1, **SKIPPING)
    with pytest.raises(DataError, match="all 1 steps were left out"):
        trainer.train(config, world, stop)
    assert not (config.work_dir / "final").exists()


def test_too_many_in_a_row_end_the_run(world: World, stop: StopRequest, sft_config: Configure, poison: Callable[..., None]) -> None:
    poison(dict.fromkeys((2, 3), math.inf))
    with pytest.raises(DataError, match=r"step 3: loss inf.* 2 steps in a row were left out"):
        trainer.train(sft_config(total_step=9, max_skipped_steps=2, **SKIPPING), world, stop)
