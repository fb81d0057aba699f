"""Adapters in peft's folder form, read and checked: peft itself passes over what is missing, and trusts what it finds."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from xtuner_core.adapters.qlora import QUANTIZED_BASE
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.models.check import is_finite

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; the others take something out of it, which is known only to the training."""
_OTHER_MODELS = ("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config", "velora_config", "kasa_config")
"""Settings of peft's LoRA that make something else of the model than base weights plus a change of them."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA or DoRA adapter: peft's description of it, and its tensors, which stay in their file until they are used."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    quantized_base: dict[str, Any] | None
    """What `qlora.save_adapter` says of the base; None for any other adapter."""


def open_adapter(folder: Path) -> Adapter:
    """Read a peft folder.

    Raises:
        RecipeError: it is no adapter, or of a kind that cannot become part of a model's weights.
        DataError: a file is damaged, or a tensor holds NaN or infinity.
    """
    fields = _fields(folder)
    _require_mergeable(folder, fields)
    tensors = _tensors(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{folder / WEIGHTS}: the tensor {name} holds NaN or infinity. Train again with a lower learning rate.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that this version of peft does not know
        config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.inference_mode = True
    return Adapter(folder, config, tensors, _json(folder / QUANTIZED_BASE) if (folder / QUANTIZED_BASE).is_file() else None)


def _fields(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        known = "; it holds a whole model" if (folder / "config.json").is_file() else ""
        raise RecipeError(f"{folder}: no adapter in peft's form, {CONFIG} is missing{known}.")
    return _json(folder / CONFIG)


def _json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error}). Copy the adapter again.") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: must be a mapping, is {type(fields).__name__}. Copy the adapter again.")
    return fields


def _require_mergeable(folder: Path, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise RecipeError(f"{folder / CONFIG}: peft_type is {kind}; only LORA (with rsLoRA and DoRA) can become part of a model's weights.")
    if (start := fields.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise RecipeError(
            f"{folder / CONFIG}: init_lora_weights is {start}, which changed the base before training. Convert the adapter to plain LoRA "
            "where it was trained: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)."
        )
    if other := [name for name in _OTHER_MODELS if fields.get(name)]:
        raise RecipeError(f"{folder / CONFIG}: {', '.join(other)} cannot become part of a model's weights.")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Memory-mapped."""
    try:
        return load_file(file)
    except FileNotFoundError:
        pickled = file.with_suffix(".bin").is_file()
        told = " A pickle is there (adapter_model.bin), which may run code and is never opened; save it as safetensors." if pickled else ""
        raise DataError(f"{file}: missing.{told or ' Copy the adapter again.'}") from None
    except SafetensorError as error:
        raise DataError(f"{file}: not a whole safetensors file ({error}). Copy the adapter again.") from None
