"""Where a model keeps its decoder layers: recompute, compile and sharding are applied to each of them from outside."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from xtuner_core.errors import RecipeError


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers in order: of the lists that it holds itself, the one as long as the config says.

    Raises:
        RecipeError: there is no such list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.get_decoder().children() if isinstance(module, torch.nn.ModuleList)]
    found = next((module for module in lists if len(module) == count), None)
    if found is None:
        raise RecipeError(f"model.base: {type(model).__name__} keeps its {count} decoder layers in an unknown place; choose another model.")
    return list(found)
