"""LoRA through peft, put into the model's own layers before sharding."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from transformers import PreTrainedModel

from xtuner_core.config import LoraConfig
from xtuner_core.errors import RecipeError

ADAPTER = "default"


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """peft's own description of the adapter; it also becomes adapter_config.json."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freeze the model and give its target layers fp32 adapters, the same on every rank.

    Raises:
        RecipeError: no layer has one of the target names; lists the linear layers that exist.
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(peft_config(lora), model, adapter_name=ADAPTER)
    except ValueError as error:
        linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        raise RecipeError(f"train.lora.targets {lora.targets!r}: {error} The linear layers are: {', '.join(sorted(linear))}.") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
