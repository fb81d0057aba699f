"""Where a run stands: what a checkpoint keeps beside its tensors, and how the next run takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.checkpoint import state, store
from xtuner_core.config import SftConfig
from xtuner_core.errors import RecipeError
from xtuner_core.guards import History
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World
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

    Raises:
        RecipeError: the checkpoint is past the last step.
    """
    folder = store.newest(config.work_dir)
    position = Position.of_checkpoint(store.facts(folder)) if folder else Position()
    if position.step > total:
        raise RecipeError(
            f"the checkpoint in {config.work_dir} is at step {position.step}, and {total} are asked for. Ask for more, or start over."
        )
    if folder:
        tensors = state.collect(model, optimizer, world)
        if world.rank >= store.facts(folder)["world_size"]:  # a rank that did not exist then starts its own random stream
            tensors = state.without_random_streams(tensors)
        store.load(folder, tensors)
        state.restore(model, optimizer, world, tensors)
        say(world.rank, f"resumed from {folder.name}")
    forget_after(position.step, config, world)
    return position
