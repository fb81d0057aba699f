"""Train the model's own weights: all of them, or all but those that `train.freeze` names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models.precision import COMPUTE


def load(model_dir: Path, train: TrainConfig, **options: Any) -> PreTrainedModel:
    """All weights in the precision in which `train.weights` keeps them."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=COMPUTE[train.weights], **options)


def prepare(model: PreTrainedModel, train: TrainConfig, seed: int) -> None:
    """Freeze the named parameters and keep them in the precision they compute in.

    Raises:
        RecipeError: a pattern of `train.freeze` matches no parameter, or nothing is left to train; lists the parameters that exist.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied weight goes by either of its names
    for pattern in train.freeze:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(f"train.freeze: {pattern!r} matches no parameter. The parameters are: {_summary(list(named))}.")
        for name in matched:
            named[name].requires_grad_(False).data = named[name].data.to(COMPUTE[train.dtype])
    if not any(parameter.requires_grad for parameter in named.values()):
        raise RecipeError(f"train.freeze: {', '.join(train.freeze)} leaves nothing to train. The parameters are: {_summary(list(named))}.")


def _summary(names: list[str]) -> str:
    """Each name once, with `*` for the numbers of layers and experts."""
    return ", ".join(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names))
