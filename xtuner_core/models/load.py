"""Build the model of a Hugging Face folder for training."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from xtuner_core import adapters, registry
from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models import attention
from xtuner_core.models.precision import COMPUTE


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


def outline_model(model_dir: Path, train: TrainConfig) -> PreTrainedModel:
    """The same model without its weights (xtuner_core/parallel/spread.py brings them).

    Not on the meta device, where buffers and adapters would have no values: memory is reserved as usual, but what is never written
    takes no room.

    Raises:
        RecipeError: the folder is not a model that transformers can load.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=COMPUTE[train.dtype], attn_implementation=attention.register())
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{model_dir}: transformers cannot load this model: {error}") from None
    model.tie_weights()
    model.config.use_cache = False
    return model
