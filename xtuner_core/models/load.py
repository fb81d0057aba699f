"""Build the model of a Hugging Face folder for training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models import attention


def storage_dtype(train: TrainConfig) -> torch.dtype:
    """Trained weights are kept in fp32; a frozen base is kept in the precision it computes in."""
    return torch.bfloat16 if train.method == "lora" and train.dtype == "bf16" else torch.float32


def load_model(model_dir: Path, train: TrainConfig) -> PreTrainedModel:
    """The folder's model on the CPU, with document attention and no cache.

    Raises:
        RecipeError: the folder is not a model that transformers can load.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=storage_dtype(train), attn_implementation=attention.register(), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{model_dir}: transformers cannot load this model: {error}") from None
    model.config.use_cache = False
    return model
