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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import PreTrainedModel

from xtuner_core.adapters.qlora import as_quantized
from xtuner_core.checkpoint.hf import copy_texts
from xtuner_core.durable import drafted, write_json
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.adapter import Adapter, open_adapter
from xtuner_core.export.checkpoint import open_model, outline, to_hugging_face
from xtuner_core.export.internlm2 import in_llama_form
from xtuner_core.export.tensors import Lazy, Tensors, finite, open_folder, write_folder
from xtuner_core.models.check import read_config, some
from xtuner_core.progress import shown

BLOCK = 1 << 20
"""Numbers of a weight that are merged at a time."""
Weighted = Sequence[tuple[Adapter, float]]
"""Adapters, and what the change that each makes is multiplied with."""


def merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    quantized_base: Literal["auto", "nf4", "none"] = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write base + Σ weight·change as the new Hugging Face folder `folder`, whole or not at all, with a progress bar on a terminal.

    Tensors have `dtype`, or what they have in the base. Memory: small blocks of a linear layer; of adapted experts and
    embeddings four times the tensor in fp32.
    An InternLM2 base and its adapters get their llama form first, and the result has it: no code of the folder's own is needed, or run.
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
    with drafted(folder) as draft, in_llama_form(base, [path for path, _ in adapters], draft.with_suffix(".llama.draft")) as (base, paths):
        opened = [(open_adapter(path), weight) for path, (_, weight) in zip(paths, adapters, strict=True)]
        for adapter, _ in opened:
            if (named := adapter.config.base_model_name_or_path) and Path(named).name != base.name:
                say(f"note: {adapter.folder} says that it was trained on {named}")
        tensors = published(base, opened, dtype, quantized_base, say)
        draft.mkdir()
        with shown(sum(tensor.bytes for tensor in tensors.values())) as wrote:
            write_folder(tensors, draft, max_shard_size, wrote)
        copy_texts(base, draft, str(dtype).removeprefix("torch.") if dtype else None)
        if tensors.keys() != open_folder(base).keys():
            write_json(draft / "config.json", {**read_config(draft / "config.json"), "tie_word_embeddings": False})


def published(base: Path, adapters: Weighted, dtype: torch.dtype | None, quantized: str, say: Callable[[str], None]) -> dict[str, Lazy]:
    """The tensors of the merged folder; reading one that holds NaN or infinity fails (for other arguments and errors see `merge`)."""
    stored, model = open_folder(base), open_model(base)
    own = {name: tensor.dtype for name, tensor in stored.items()}
    dtypes = {name: dtype if dtype and kind.is_floating_point else kind for name, kind in own.items()}
    seen = _seen_in_training(model, base, [adapter for adapter, _ in adapters], quantized, say)
    new = to_hugging_face(base, {**seen, **changes({**model, **seen}, base, adapters)})
    every = {name: tensor for name, tensor in stored.items() if name not in new} | new
    usual = next(iter(dtypes.values()))  # of a tensor that was tied to another
    return finite({name: tensor.to(dtypes.get(name, usual)) for name, tensor in every.items()})


def _seen_in_training(
    model: Tensors, base: Path, adapters: Sequence[Adapter], quantized: str, say: Callable[[str], None]
) -> dict[str, Lazy]:
    """Tensors of the base as the adapters saw them, if not as they are: quantized and de-quantized."""
    told = [adapter.quantized_base for adapter in adapters]
    if quantized == "auto" and any(one != told[0] for one in told):
        raise RecipeError("some of the adapters were trained beside a 4-bit base and others not; say which it is to be: --quantized-base.")
    if quantized == "none" or (quantized == "auto" and told[0] is None):
        return {}
    dtype = getattr(torch, (told[0] or read_config(base / "config.json")).get("dtype") or "bfloat16")
    say(f"the linear layers of {base} are quantized to 4 bits (NF4) and de-quantized again first, as the adapter saw them in training")
    return as_quantized(model, outline(base), dtype)


def merged(base: Tensors, config_dir: Path, adapters: Weighted) -> dict[str, Lazy]:
    """The merged model: `changes`, and the rest as it is in `base`; for the same arguments and errors."""
    return {**base, **changes(base, config_dir, adapters)}


def changes(base: Tensors, config_dir: Path, adapters: Weighted) -> dict[str, Lazy]:
    """What adapters change of a model, in fp32; all named as in the model of `config_dir` (checkpoint.py: `open_model`).

    Several adapters are added one after the other, each one's scaling times its weight. If only one of two tied tensors changes, both are
    among the result.

    Raises:
        RecipeError: these adapters cannot be merged.
        DataError: an adapter is not of this base.
    """
    _require_one_meaning(adapters)
    model = outline(config_dir)
    peft = _with_adapters(model, adapters)
    tied = {alias: source for alias, source in model.all_tied_weights_keys.items() if source in base and alias not in base}
    along = _saved_along(peft, base)
    whole = {**base, **along}
    whole |= {alias: whole[source] for alias, source in tied.items()}
    changed = dict(_changed(peft, whole))
    for alias, source in tied.items():
        if {alias, source} & changed.keys() and not _follows(peft, alias):
            changed |= {name: changed.get(name, whole[name]) for name in (alias, source)}
    return {**along, **changed}


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


_ADAPTER = re.compile(r"\.adapter\d+\b")
"""Marks the names of what belongs to an adapter."""


class _Unfilled(PeftModel):
    """peft's model without numbers; those of its adapters are kept beside it, by the name of their parameter."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.numbers: dict[str, torch.Tensor] = {}

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        """What peft's own loading calls at last, with the names of the model's parameters."""
        self.numbers |= state_dict


def _with_adapters(model: PreTrainedModel, adapters: Weighted) -> _Unfilled:
    peft = None
    for number, (adapter, weight) in enumerate(adapters):
        name = f"adapter{number}"
        with _told_by_peft(adapter.folder):
            if peft is None:
                peft = _Unfilled(model, adapter.config, name, low_cpu_mem_usage=True)
            else:
                peft.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
            before = set(peft.numbers)
            set_peft_model_state_dict(peft, adapter.tensors, name)
        _require_fit(adapter.folder, peft, name, peft.numbers.keys() - before)
        for layer in peft.modules():
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                layer.scaling[name] *= weight
    assert peft is not None
    return peft


@contextmanager
def _told_by_peft(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{folder}: peft cannot put this adapter into the base: {reason.rstrip('.')}. Give the base it was trained on."
        ) from None


def _require_fit(folder: Path, peft: _Unfilled, name: str, given: set[str]) -> None:
    """Refuse tensors that are not exactly those of the adapter's config in this base (DataError)."""
    every = {key: tuple(tensor.shape) for key, tensor in peft.state_dict().items()}
    wanted = {key for key, _ in peft.named_parameters() if f".{name}." in f"{key}."}
    told = [f"{_in_file(key)} is missing" for key in sorted(wanted - given)]
    told += [f"{_in_file(key)} has no place in this base" for key in sorted(given - every.keys())]
    for key in sorted(given & every.keys()):
        if (found := tuple(peft.numbers[key].shape)) != every[key]:
            told.append(f"{_in_file(key)} is {list(found)} and should be {list(every[key])} for this base")
    if told:
        raise DataError(f"{folder}: not an adapter of this base: {some(told)}. Give the base it was trained on.")


def _in_file(key: str) -> str:
    return re.sub(r"\.(modules_to_save\.)?adapter\d+\b", "", key)


def _in_base(key: str) -> str:
    """The base model's name of a module or parameter that peft has wrapped."""
    return re.sub(r"\.(base_layer|token_adapter|original_module|modules_to_save\.adapter\d+)\b", "", key.removeprefix("base_model.model."))


def _saved_along(peft: _Unfilled, base: Tensors) -> dict[str, Lazy]:
    """Weights of the base that the adapter's file brings with it: an embedding that was resized, say."""
    named = {_in_base(key): tensor for key, tensor in peft.numbers.items() if not _ADAPTER.search(key)}
    return {name: Lazy.of(tensor).to(torch.float32) for name, tensor in named.items() if name in base}


def _lazy(shape: tuple[int, ...], blocks: Callable[[], Iterator[torch.Tensor]], never_whole: bool) -> Lazy:
    def stream() -> Iterator[torch.Tensor]:
        return (block.reshape(-1) for block in blocks())

    return Lazy(shape, torch.float32, lambda: _joined(blocks()), stream=stream, never_whole=never_whole)


def _changed(peft: _Unfilled, base: Tensors) -> Iterator[tuple[str, Lazy]]:
    """Every tensor that an adapter changes, in fp32."""
    for key, tensor in peft.numbers.items():
        if ".modules_to_save." in key:
            yield _in_base(key), Lazy.of(tensor).to(torch.float32)
    for path, layer in peft.named_modules():
        if isinstance(layer, LoraLayer | TrainableTokensLayer) and not getattr(layer, "tied_adapter", None):
            for parameter in _parameters(layer):
                name = f"{_in_base(path)}.{parameter}"
                if name not in base:
                    raise DataError(f"tensor {name} is missing in the base's weights. Copy the model folder again.")
                yield name, _lazy(base[name].shape, partial(_merge_layer, layer, path, parameter, peft.numbers, base), _has_rows(layer))


def _parameters(layer: LoraLayer | TrainableTokensLayer) -> list[str]:
    """What the layer changes of the one it wraps."""
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    return ["weight", "bias"] if any(getattr(layer, "lora_bias", {}).values()) else ["weight"]


def _merge_layer(layer: Any, path: str, parameter: str, numbers: dict[str, torch.Tensor], base: Tensors) -> Iterator[torch.Tensor]:
    """The parameter after peft's merge, some rows at a time."""
    layer = copy.deepcopy(layer)  # has no numbers yet
    originals = {name: base[f"{_in_base(path)}.{name}"].read() for name in _parameters(layer)}
    own = {key: numbers[f"{path}.{key}"].float() for key in layer.state_dict() if _ADAPTER.search(key)}
    for rows in _blocks(layer, originals[parameter]):
        yield _merge_rows(layer, parameter, originals, own, rows)


def _blocks(layer: Any, parameter: torch.Tensor) -> list[slice]:
    """Rows of a linear layer that are merged at a time: what fits a cache is faster, and takes no memory; of other layers all.

    Never fewer than 64 if there are as many: products with a few rows are summed in another order than those with all.
    """
    if not _has_rows(layer):
        return [slice(None)]
    count = max(1, min(parameter.numel() // BLOCK, len(parameter) // 64))
    return [slice(*ends) for ends in pairwise(len(parameter) * number // count for number in range(count + 1))]


def _has_rows(layer: Any) -> bool:
    """Whether rows of its weight can be merged without the others."""
    return isinstance(layer, Linear) and not layer.fan_in_fan_out


@torch.no_grad()
def _merge_rows(layer: Any, parameter: str, originals: dict[str, torch.Tensor], own: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
    wrapped = layer.get_base_layer()
    for name, original in originals.items():
        setattr(wrapped, name, nn.Parameter(original[rows].to(torch.float32, copy=True), requires_grad=False))  # peft adds in place
    for key, tensor in own.items():
        owner, _, name = key.rpartition(".")
        part = tensor if "lora_A" in key or rows == slice(None) else tensor[rows]
        setattr(layer.get_submodule(owner), name, nn.Parameter(part, requires_grad=False))
    layer.merge(adapter_names=sorted(layer._get_available_adapters(), key=_number))
    layer.merged_adapters.clear()
    return getattr(wrapped, parameter).data


def _joined(blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    found = list(blocks)
    return found[0] if len(found) == 1 else torch.cat(found)


def _number(name: str) -> int:
    return int(name.removeprefix("adapter"))


def _follows(peft: _Unfilled, alias: str) -> bool:
    """Whether a tied tensor has the same trained tokens as the one it is tied to."""
    module = peft.get_submodule(f"base_model.model.{alias.rsplit('.', 1)[0]}")
    return bool(getattr(getattr(module, "token_adapter", None), "tied_adapter", None))
