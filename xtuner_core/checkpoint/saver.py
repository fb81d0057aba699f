"""When a checkpoint is saved, and which ones are kept."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.checkpoint import state, store
from xtuner_core.checkpoint.resume import Position
from xtuner_core.config import SftConfig
from xtuner_core.metrics import clock, say
from xtuner_core.parallel.mesh import World


class Saver:
    """Publishes `checkpoints/step-N`, and drops those that nobody needs any more.

    A context: when it is left, what was begun is written.
    """

    def __init__(self, config: SftConfig, model: PreTrainedModel, optimizer: Optimizer, start: Position, world: World) -> None:
        self._config, self._model, self._optimizer, self._world = config, model, optimizer, world
        self._saved = start.step  # before the first step there is nothing to save, and after a resume nothing new
        self._when = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def due(self, step: int, total: int) -> bool:
        """Whether the settings ask for a checkpoint after `step` steps; at the end there is `final` instead."""
        interval = self._config.train.checkpoint_interval
        return step < total and bool(interval) and step % (interval or 1) == 0

    def save(self, position: Position) -> None:
        """Save, unless the checkpoint of this step is there; all ranks call it."""
        if position.step == self._saved:
            return
        folder: Path = self._config.work_dir / "checkpoints" / f"step-{position.step}"
        store.save(folder, state.collect(self._model, self._optimizer, self._world), position.facts(), self._world)
        self._saved, self._when = position.step, clock()
        if self._world.rank == 0:
            store.keep_newest(self._config.work_dir, 2)
            say(self._world.rank, f"saved checkpoint {folder.name}")
