"""LoRA through peft, put into the model's own layers before sharding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from xtuner_core.config import LoraConfig, TrainConfig
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError
from xtuner_core.models.precision import COMPUTE

ADAPTER = "default"


def load_options(train: TrainConfig) -> dict[str, Any]:
    """A frozen base is kept in the precision it computes in."""
    return {"dtype": COMPUTE[train.dtype]}


def prepare(model: PreTrainedModel, train: TrainConfig, seed: int) -> None:
    """Freeze the model and add adapters (RecipeError: a target name matches nothing)."""
    add_lora(model, train.lora, seed)


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


def save_adapter(tensors: Mapping[str, torch.Tensor], lora: LoraConfig, base: str, folder: Path) -> None:
    """Write trained adapter tensors, named as in the model, as a folder that peft loads; `base` names the base model for readers."""
    folder.mkdir(parents=True)
    config = peft_config(lora)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    write_json(folder / "adapter_config.json", _jsonable(config.to_dict()))
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensors[name].contiguous() for name in sorted(tensors)}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _jsonable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _jsonable(value) for key, value in tree.items()}
    return sorted(tree) if isinstance(tree, set) else getattr(tree, "value", tree)
