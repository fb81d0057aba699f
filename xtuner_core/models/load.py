"""Build the model of a Hugging Face folder for training."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from xtuner_core import adapters, registry
from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models import attention


def load_model(model_dir: Path, train: TrainConfig) -> PreTrainedModel:
    """The folder's model on the CPU, with document attention and no cache.

    Raises:
        RecipeError: the folder is not a model that transformers can load.
    """
    try:
        model = registry.find(adapters, train.method).load(
            model_dir, train, attn_implementation=attention.register(), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{model_dir}: transformers cannot load this model: {error}") from None
    model.config.use_cache = False
    return model
