"""Where a run stands: what a checkpoint keeps beside its tensors, and how the next run takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.checkpoint import start, state, store
from xtuner_core.config import SftConfig
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.guards import History
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World, any_rank, gather_numbers
from xtuner_core.validation import Measured, forget_after


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come: `step` optimizer steps are done, with this history of gradient norms and of validation losses."""

    step: int = 0
    history: History = field(default_factory=History)
    measured: Measured = field(default_factory=Measured)

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> Position:
        """What the facts of a checkpoint tell."""
        return cls(facts["step"], History.of_checkpoint(facts), Measured.of_checkpoint(facts))

    def facts(self) -> dict[str, Any]:
        """What `of_checkpoint` reads."""
        return {"step": self.step, "history": asdict(self.history), "measured": asdict(self.measured)}


def resume(config: SftConfig, model: PreTrainedModel, optimizer: Optimizer, total: int, world: World) -> Position:
    """Load the newest whole checkpoint, if there is one, into model, optimizer and random generators; where the run goes on.

    A run that begins takes the weights of `train.start`, if that is given; its errors are those of `start.begin`.

    Raises:
        RecipeError: the checkpoint is past the last step.
    """
    folder = newest_of_all(config.work_dir, world)
    position = Position.of_checkpoint(store.facts(folder)) if folder else Position()
    if position.step > total:
        raise RecipeError(
            f"the checkpoint in {config.work_dir} is at step {position.step}, and {total} are asked for. Ask for more, or start over."
        )
    if folder:
        tensors = state.collect(model, optimizer, world)
        if not {name for name in tensors if name.startswith("rng.")} <= store.described(folder).keys():
            tensors = state.without_random_streams(tensors)  # a rank or device that was not there then starts its own
        store.load(folder, tensors)
        state.restore(model, optimizer, world, tensors)
        say(world.rank, f"resumed from {folder.name}")
    elif config.train.start:
        start.begin(config, model, world)
    forget_after(position.step, config, world)
    return _with_best(position, config, world)


def _with_best(position: Position, config: SftConfig, world: World) -> Position:
    """The position; without the validation losses, which are then measured from here on, if the lowest one's checkpoint is not there."""
    measured = position.measured
    if not config.train.checkpoint_best or measured.best_loss is None or measured.best_step == position.step:
        return position
    if not any_rank(world.rank == 0 and not store.is_whole(checkpoint_of(config.work_dir, measured.best_step)), world):
        return position
    say(world.rank, f"the best checkpoint, step-{measured.best_step}, is not there or damaged; the next measurement counts as the best")
    return replace(position, measured=Measured())


def load_best(config: SftConfig, model: PreTrainedModel, at: Position, world: World) -> None:
    """Give the model the trained tensors that it had at the lowest validation loss.

    Raises:
        DataError: that checkpoint is damaged.
    """
    step = at.measured.best_step
    say(world.rank, f"the result is that of step {step}, which has the lowest validation loss: {at.measured.best_loss:.3f}")
    if step == at.step:
        return
    folder = checkpoint_of(config.work_dir, step)
    if any_rank(world.rank == 0 and not store.is_whole(folder), world):
        raise DataError(f"{folder}: the best checkpoint was damaged since it was saved. Run the same command again.")
    store.load(folder, {f"model.{name}": tensor for name, tensor in state.trained_tensors(model).items()}, partly=True)


def checkpoint_of(work_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return work_dir / "checkpoints" / f"step-{step}"


def newest_of_all(work_dir: Path, world: World) -> Path | None:
    """The newest whole checkpoint: rank 0 reads every byte for it, and tells the others."""
    found = store.newest(work_dir, partial(say, 0)) if world.rank == 0 else None
    [name] = gather_numbers([store.step_of(found)] if found else [], world) or [None]
    return None if name is None else checkpoint_of(work_dir, name)
