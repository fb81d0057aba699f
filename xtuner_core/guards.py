"""Checks that keep broken numbers out of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from xtuner_core.config import TrainConfig
from xtuner_core.errors import DataError
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World, any_rank, gather_numbers

SHOWN = 20
"""Documents that a message names."""


@dataclass(frozen=True, slots=True)
class History:
    """What the skip rule remembers; part of a checkpoint, so that a resumed run leaves out the same steps.

    norms: gradient norms before clipping of the last applied steps, oldest first.
    in_a_row: steps left out since the last applied one, so 0 means that the last step is to be applied.
    skipped: steps left out in all.
    """

    norms: tuple[float, ...] = ()
    in_a_row: int = 0
    skipped: int = 0

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> History:
        """What the facts of a checkpoint tell; nothing before there was a rule."""
        told = facts.get("history", asdict(cls()))
        return cls(tuple(told["norms"]), told["in_a_row"], told["skipped"])


def judge(
    history: History, step: int, loss: float, grad_norm: float, documents: Sequence[int], train: TrainConfig, world: World
) -> History:
    """Decide before the update whether step `step` (from 1) is applied or, its `in_a_row` not being 0, left out.

    Left out, if `train.skip_grad_norm_factor` is set, is a step that `is_outlier`; all ranks decide alike, and weights and optimizer
    state stay as they are. The norm of such a step does not count for later ones.

    Raises:
        DataError: loss or gradient is not finite and no step may be left out, or `train.max_skipped_steps` were left out in a row. The
            message names the step, the values and the documents; the weights and the last checkpoint stay good.
    """
    if train.skip_grad_norm_factor is None:
        if not _finite(loss, grad_norm):
            raise DataError(f"{_describe(step, loss, grad_norm, gather_numbers(documents, world))}{ADVICE}")
        return History(history.norms, 0, history.skipped)  # a run with the rule may have stopped after a step that it left out
    if not any_rank(is_outlier(history, loss, grad_norm, train), world):
        return History((*history.norms, grad_norm)[-train.skip_grad_norm_window :], 0, history.skipped)
    told = _describe(step, loss, grad_norm, gather_numbers(documents, world))
    say(world.rank, f"left out {told}")
    if history.in_a_row + 1 >= train.max_skipped_steps:
        raise DataError(f"{told} {train.max_skipped_steps} steps in a row were left out (train.max_skipped_steps).{ADVICE}")
    return History(history.norms, history.in_a_row + 1, history.skipped + 1)


def is_outlier(history: History, loss: float, grad_norm: float, train: TrainConfig) -> bool:
    """Whether a number is not finite, or the norm is above `skip_grad_norm_factor` times the median of the last `skip_grad_norm_window`.

    Until so many norms are known only finiteness counts: they are large and fall fast when a training begins.
    """
    if not _finite(loss, grad_norm):
        return True
    known = history.norms[-train.skip_grad_norm_window :]
    factor = train.skip_grad_norm_factor
    return factor is not None and len(known) == train.skip_grad_norm_window and grad_norm > factor * median(known)


ADVICE = " Look at them with `xtuner preview`, or lower train.lr."


def _finite(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm)


def _describe(step: int, loss: float, grad_norm: float, documents: Sequence[int]) -> str:
    named = ", ".join(map(str, documents[:SHOWN])) + (f", … ({len(documents)} in all)" if len(documents) > SHOWN else "")
    return f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were left unchanged. Documents of the step: [{named}]."
