"""When a checkpoint is saved, which ones are kept, and how that goes on beside the training."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.checkpoint import state, store
from xtuner_core.checkpoint.resume import Position, checkpoint_of
from xtuner_core.config import SftConfig
from xtuner_core.errors import Interrupted, UserError
from xtuner_core.metrics import clock, say
from xtuner_core.parallel.mesh import World


class Saver:
    """Publishes `checkpoints/step-N`, and drops those that are not to be kept.

    With `train.async_checkpoint` tensors are copied to the host and written by a thread while the training goes on, by the same code,
    so the bytes are the same. At most one is under way. Its ranks meet in a process group of their own: collectives of two threads in
    one group would be taken for each other. A context: when it is left, what was begun is finished.
    """

    def __init__(self, config: SftConfig, model: PreTrainedModel, optimizer: Optimizer, start: Position, world: World) -> None:
        self._config, self._model, self._optimizer, self._world = config, model, optimizer, world
        self._saved = start.step  # before the first step there is nothing to save, and after a resume nothing new
        self._when = clock()
        self._under_way: Future[None] | None = None
        self._background = _Background() if config.train.async_checkpoint else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.finish()
        except UserError as failure:
            if error is None or isinstance(error, Interrupted):
                raise
            say(self._world.rank, str(failure))  # beside what ends the run anyway

    def late(self) -> bool:
        """Whether the last checkpoint is older than `train.checkpoint_minutes`, by this rank's clock."""
        minutes = self._config.train.checkpoint_minutes
        return minutes is not None and clock() - self._when >= 60 * minutes

    def failed(self) -> bool:
        """Whether the checkpoint that is under way could not be written, as far as this rank knows yet."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def due(self, position: Position, last: bool, late: bool) -> bool:
        """Whether the settings ask for a checkpoint at this position; at the `last` one there is `final` instead, unless asked for too."""
        train = self._config.train
        if last:
            return train.checkpoint_last
        at_interval = train.checkpoint_interval is not None and position.step % train.checkpoint_interval == 0
        return at_interval or late or (train.checkpoint_best and position.measured.best_step == position.step)

    def save(self, position: Position) -> None:
        """Save, unless the checkpoint of this step is there; all ranks call it.

        Raises:
            StorageError: this one, or the one that was under way, cannot be written.
        """
        if position.step == self._saved:
            return
        self.finish()
        self._saved, self._when = position.step, clock()
        tensors = state.collect(self._model, self._optimizer, self._world)
        if self._background:
            self._under_way = self._background.thread.submit(self._write, self._background.copy(tensors), position, self._background.group)
        else:
            self._write(tensors, position, None)

    def finish(self) -> None:
        """Wait for the checkpoint that is under way (StorageError: it could not be written)."""
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()

    def _write(self, tensors: dict[str, torch.Tensor], position: Position, group: dist.ProcessGroup | None) -> None:
        train = self._config.train
        folder = checkpoint_of(self._config.work_dir, position.step)
        store.save(folder, tensors, position.facts(), self._world, group)
        if self._world.rank == 0:
            best = position.measured.best_step if train.checkpoint_best else None
            store.keep(self._config.work_dir, position.step, train.checkpoint_keep, best)
            say(self._world.rank, f"saved checkpoint {folder.name}")


class _Background:
    """What it takes to write beside the training: a thread, a process group, and host memory for the copies, which is used again."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))  # pinned where there is a GPU

    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are now, on the host."""
        return cast(dict[str, torch.Tensor], self._stager.stage(tensors))
