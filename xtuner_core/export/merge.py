"""Adapters become part of a model's weights: peft's own merge in fp32, one layer at a time, rounded once.

The model and its adapters are built without their numbers (device meta). For each adapted layer a copy of peft's layer is given the
numbers of this layer alone, merges them, and is dropped. So whatever peft's LoRA can do comes out as peft has it: rsLoRA, DoRA, biases,
embeddings, ranks by pattern, parameters of experts, whole modules that were trained beside the adapter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.adapters.qlora import as_quantized
from xtuner_core.checkpoint.hf import copy_texts
from xtuner_core.durable import drafted, write_json
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.adapter import Adapter, open_adapter
from xtuner_core.export.tensors import Lazy, Tensors, finite, open_folder, write_folder
from xtuner_core.models.check import read_config, some

Weighted = Sequence[tuple[Adapter, float]]
"""Adapters, and what the change that each makes is multiplied with."""


def merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    wrote: Callable[[int], None] = lambda count: None,
    quantized_base: Literal["auto", "nf4", "none"] = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write base + Σ weight·change as the new Hugging Face folder `folder`, whole or not at all.

    Tensors have `dtype`, or what they have in the base. Memory: three times the largest adapted tensor in fp32 (five times for DoRA).
    `quantized_base` nf4 quantizes the base and de-quantizes it again first, as method qlora saw it; auto does so for its adapters.

    Raises:
        RecipeError: these adapters cannot be merged, or there is something at `folder`.
        DataError: an adapter is damaged or not of this base, or the merge gives NaN or infinity.
    """
    if "quantization_config" in read_config(base / "config.json"):
        raise RecipeError(
            f"{base}: its weights are stored quantized, and a merge would have to quantize them anew. Merge into the model it was made "
            "from; if the adapter was trained beside 4-bit NF4 weights, with --quantized-base nf4."
        )
    opened = [(open_adapter(path), weight) for path, weight in adapters]
    stored = open_folder(base)
    seen = _as_in_training(stored, base, [adapter for adapter, _ in opened], quantized_base, say)
    tensors = finite(_rounded(merged(seen, base, opened), stored, dtype))
    with drafted(folder) as draft:
        draft.mkdir()
        write_folder(tensors, draft, max_shard_size, wrote)
        copy_texts(base, draft, str(dtype).removeprefix("torch.") if dtype else None)
        if tensors.keys() != stored.keys():
            write_json(draft / "config.json", {**read_config(draft / "config.json"), "tie_word_embeddings": False})


def _rounded(tensors: Tensors, stored: Tensors, dtype: torch.dtype | None) -> dict[str, Lazy]:
    """To `dtype`, or to what they had in the base; one that was tied to another there has the type of the first."""
    usual = next(iter(stored.values())).dtype
    own = {name: stored[name].dtype if name in stored else usual for name in tensors}
    return {name: tensor.to(dtype if dtype and own[name].is_floating_point else own[name]) for name, tensor in tensors.items()}


def _as_in_training(stored: Tensors, base: Path, adapters: Sequence[Adapter], quantized: str, say: Callable[[str], None]) -> Tensors:
    """The base as the adapters knew it: itself, or quantized and de-quantized."""
    told = [adapter.quantized_base for adapter in adapters]
    if quantized == "auto" and any(one != told[0] for one in told):
        raise RecipeError("some of the adapters were trained beside a 4-bit base and others not; say which it is to be: --quantized-base.")
    if quantized == "none" or (quantized == "auto" and told[0] is None):
        return stored
    dtype = getattr(torch, (told[0] or read_config(base / "config.json")).get("dtype") or "bfloat16")
    say(f"the linear layers of {base} are quantized to 4 bits (NF4) and de-quantized again first, as the adapter saw them in training")
    return as_quantized(stored, _model(base), dtype)


def merged(base: Tensors, config_dir: Path, adapters: Weighted) -> dict[str, Lazy]:
    """The merged model: what an adapter changes in fp32, the rest as it is in `base`; named as in the model of `config_dir`.

    Several adapters are added one after the other, each one's scaling times its weight. If only one of two tied tensors changes, the
    result has both.

    Raises:
        RecipeError: these adapters cannot be merged.
        DataError: an adapter is not of this base.
    """
    _require_one_meaning(adapters)
    model = _model(config_dir)
    outline = _outline(model, adapters)
    tied = {alias: source for alias, source in model.all_tied_weights_keys.items() if source in base and alias not in base}
    whole = {**base, **{alias: base[source] for alias, source in tied.items()}, **_saved_along(outline, base)}
    changed = dict(_changed(outline, whole))
    untied = {alias for alias, source in tied.items() if {alias, source} & changed.keys() and not _follows(outline, alias)}
    return {name: changed.get(name, tensor) for name, tensor in whole.items() if name in base or name in untied}


def _require_one_meaning(adapters: Weighted) -> None:
    """Only LoRA's change is a sum that can be weighed and added to another."""
    if [weight for _, weight in adapters] == [1.0]:
        return
    for adapter, _ in adapters:
        config = adapter.config
        kinds = {"DoRA": config.use_dora, "modules_to_save": config.modules_to_save, "trained tokens": config.trainable_token_indices}
        if found := [kind for kind, there in kinds.items() if there]:
            raise RecipeError(
                f"{adapter.folder}: {' and '.join(found)} replaces weights instead of adding to them, so it has no share and no sum with "
                "other adapters. Merge it alone and with weight 1."
            )


def _model(config_dir: Path) -> PreTrainedModel:
    """It has shapes and no numbers."""
    config = AutoConfig.from_pretrained(config_dir, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class _Outline(PeftModel):
    """peft's model without numbers; those of its adapters are kept beside it, by the name of their parameter."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.numbers: dict[str, torch.Tensor] = {}

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        """What peft's own loading calls at last, with the names of the model's parameters."""
        self.numbers |= state_dict


def _outline(model: PreTrainedModel, adapters: Weighted) -> _Outline:
    outline = None
    for number, (adapter, weight) in enumerate(adapters):
        name = f"adapter{number}"
        with _told_by_peft(adapter.folder):
            if outline is None:
                outline = _Outline(model, adapter.config, name, low_cpu_mem_usage=True)
            else:
                outline.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
            before = outline.numbers.keys() | set()
            set_peft_model_state_dict(outline, adapter.tensors, name)
        _require_fit(adapter.folder, outline, name, outline.numbers.keys() - before)
        for layer in _lora_layers(outline):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    assert outline is not None
    return outline


def _lora_layers(outline: _Outline) -> Iterator[LoraLayer]:
    return (module for module in outline.modules() if isinstance(module, LoraLayer))


@contextmanager
def _told_by_peft(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{folder}: peft cannot put this adapter into the base: {reason} Give the base it was trained on.") from None


def _require_fit(folder: Path, outline: _Outline, name: str, given: set[str]) -> None:
    """Refuse tensors that are not exactly those of the adapter's config in this base (DataError)."""
    every = {key: tuple(tensor.shape) for key, tensor in outline.state_dict().items()}
    wanted = {key for key, _ in outline.named_parameters() if f".{name}." in f"{key}."}
    told = [f"{_in_file(key)} is missing" for key in sorted(wanted - given)]
    told += [f"{_in_file(key)} has no place in this base" for key in sorted(given - every.keys())]
    for key in sorted(given & every.keys()):
        if (found := tuple(outline.numbers[key].shape)) != every[key]:
            told.append(f"{_in_file(key)} is {list(found)} and should be {list(every[key])} for this base")
    if told:
        raise DataError(f"{folder}: not an adapter of this base: {some(told)}. Give the base it was trained on.")


def _in_file(key: str) -> str:
    return re.sub(r"\.(modules_to_save\.)?adapter\d+\b", "", key)


def _in_base(key: str) -> str:
    """The base model's name of a module or parameter that peft has wrapped."""
    return re.sub(r"\.(base_layer|token_adapter|original_module|modules_to_save\.adapter\d+)\b", "", key.removeprefix("base_model.model."))


def _saved_along(outline: _Outline, base: Tensors) -> dict[str, Lazy]:
    """Weights of the base that the adapter's file brings with it: an embedding that was resized, say."""
    named = {_in_base(key): tensor for key, tensor in outline.numbers.items() if not re.search(r"\.adapter\d+\b", key)}
    return {name: Lazy.of(tensor).to(torch.float32) for name, tensor in named.items() if name in base}


def _changed(outline: _Outline, base: Tensors) -> Iterator[tuple[str, Lazy]]:
    """Every tensor that an adapter changes, in fp32."""
    for key, tensor in outline.numbers.items():
        if ".modules_to_save." in key:
            yield _in_base(key), Lazy.of(tensor).to(torch.float32)
    for path, layer in outline.named_modules():
        if isinstance(layer, LoraLayer | TrainableTokensLayer) and not getattr(layer, "tied_adapter", None):
            for parameter in _parameters(layer):
                name = f"{_in_base(path)}.{parameter}"
                yield name, Lazy(base[name].shape, torch.float32, partial(_merge_layer, layer, path, parameter, outline.numbers, base))


def _parameters(layer: LoraLayer | TrainableTokensLayer) -> list[str]:
    """What the layer changes of the one it wraps."""
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    return ["weight", "bias"] if any(getattr(layer, "lora_bias", {}).values()) else ["weight"]


@torch.no_grad()
def _merge_layer(layer: Any, path: str, parameter: str, numbers: dict[str, torch.Tensor], base: Tensors) -> torch.Tensor:
    layer = copy.deepcopy(layer)  # has no numbers yet
    wrapped = layer.get_base_layer()
    for name in _parameters(layer):
        original = base[f"{_in_base(path)}.{name}"].read().to(torch.float32, copy=True)  # peft adds in place
        setattr(wrapped, name, nn.Parameter(original, requires_grad=False))
    own = {key: numbers[f"{path}.{key}"].float() for key in layer.state_dict() if f"{path}.{key}" in numbers}
    layer.load_state_dict(own, strict=False, assign=True)
    layer.merge(adapter_names=sorted(layer._get_available_adapters(), key=_number))
    return getattr(wrapped, parameter).data


def _number(name: str) -> int:
    return int(name.removeprefix("adapter"))


def _follows(outline: _Outline, alias: str) -> bool:
    """Whether a tied tensor has the same trained tokens as the one it is tied to."""
    module = outline.get_submodule(f"base_model.model.{alias.rsplit('.', 1)[0]}")
    return bool(getattr(getattr(module, "token_adapter", None), "tied_adapter", None))
