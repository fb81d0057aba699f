"""LoRA through peft, put into the model's own layers before sharding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.config import LoraConfig, TrainConfig
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError
from xtuner_core.export.tensors import Tensors, write_file
from xtuner_core.models.precision import COMPUTE

ADAPTER = "default"
ALL_LINEAR = "all-linear"


def load(model_dir: Path, train: TrainConfig, **options: Any) -> PreTrainedModel:
    """A frozen base is kept in the precision it computes in."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=COMPUTE[train.dtype], **options)


def prepare(model: PreTrainedModel, train: TrainConfig, seed: int) -> None:
    """Freeze the model and add adapters (RecipeError: a target name matches nothing)."""
    add_lora(model, train.lora, seed)


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """peft's own description of the adapter; it also becomes adapter_config.json."""
    targets = ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets)
    return PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora, use_dora=lora.dora,
        target_modules=targets, task_type="CAUSAL_LM", bias="none",
    )  # fmt: skip


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freeze the model and give its target layers fp32 adapters, the same on every rank.

    Raises:
        RecipeError: a target name matches no linear layer (lists those that exist), or it is the head and tied to the embedding.
    """
    _require_targets(model, lora.targets)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    inject_adapter_in_model(peft_config(lora), model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _require_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """peft is content if one name of several matches, and finds a tied head's merge out after the training."""
    if targets == (ALL_LINEAR,):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(_names(target, name) for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise RecipeError(f"train.lora.targets: {target!r} matches no linear layer. The linear layers are: {', '.join(known)}.")
    shared = model.get_input_embeddings().weight
    tied = [name for name in linear if model.get_submodule(name).weight is shared]
    if any(_names(target, name) for target in targets for name in tied):
        raise RecipeError("train.lora.targets: this model's head is its embedding (tied weights), so it cannot have an adapter.")


def _names(target: str, layer: str) -> bool:
    """peft's rule for a list of targets: the whole name, or the end of it from a dot on."""
    return layer == target or layer.endswith(f".{target}")


def save_adapter(tensors: Tensors, train: TrainConfig, base: str, folder: Path) -> None:
    """Write trained adapter tensors, named as in the model, as a folder that peft loads; `base` names the base model for readers."""
    folder.mkdir(parents=True)
    lora = train.lora
    config = peft_config(lora)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(_adapted_layers(tensors) if lora.targets == (ALL_LINEAR,) else lora.targets)
    write_json(folder / "adapter_config.json", _jsonable(config.to_dict()))
    write_file(folder / "adapter_model.safetensors", {f"base_model.model.{_saved_name(name)}": tensors[name] for name in sorted(tensors)})


def _adapted_layers(tensors: Iterable[str]) -> set[str]:
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}


def _saved_name(name: str) -> str:
    """The name of an adapter tensor in peft's file: without the adapter's own name, and DoRA's row lengths without `weight`."""
    return name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector").replace(f".{ADAPTER}.", ".")


def _jsonable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _jsonable(value) for key, value in tree.items()}
    return sorted(tree) if isinstance(tree, set) else getattr(tree, "value", tree)
