"""An engine checkpoint as a stream, and the two ways to name a model's tensors: as its modules do, and as checkpoints are published.

They differ where transformers computes with tensors that were fused, experts above all. Its own table of conversions is used, one group
of tensors at a time (transformers.core_model_loading: `convert_and_load_state_dict_in_model` and `revert_weight_conversion`, which want
the whole model in memory).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from xtuner_core.checkpoint.hf import weight_files
from xtuner_core.errors import DataError
from xtuner_core.export.tensors import Lazy, Tensors, open_file, open_folder

# Engine checkpoints -----------------------------------------------------------------------------------------------------------------


def open_checkpoint(folder: Path) -> dict[str, Lazy]:
    """Every tensor of an engine checkpoint, whole, whatever the number of processes that each saved a part of it.

    Raises:
        DataError: a file is damaged or a part is missing.
    """
    parts: dict[str, dict[tuple[int, ...], Lazy]] = {}
    for file in sorted((folder / "tensors").glob("*.safetensors")):
        held = open_file(file)
        offsets = _saved_offsets(file)
        for name, tensor in held.items():
            parts.setdefault(name, {})[offsets[name]] = tensor
    if not parts:
        raise DataError(f"{folder}: no checkpoint of the engine; there are no tensors in it.")
    return {name: _whole(folder, name, found) for name, found in parts.items()}


def _saved_offsets(file: Path) -> dict[str, tuple[int, ...]]:
    """Where in the whole tensors a file's parts begin, as torch.distributed.checkpoint notes it."""
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        return {name: tuple(one["saved_offsets"]) for name, one in told.items()}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file}: does not say which parts of the tensors it holds; it is no checkpoint of the engine.") from None


def _whole(folder: Path, name: str, parts: Mapping[tuple[int, ...], Lazy]) -> Lazy:
    """Rows that follow each other are the whole tensor's bytes already; other parts are copied together when it is read."""
    dtype = next(iter(parts.values())).dtype
    ends = [tuple(map(sum, zip(offset, part.shape, strict=True))) for offset, part in parts.items()]
    shape = tuple(map(max, zip(*ends, strict=True)))
    if sum(part.bytes for part in parts.values()) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{folder}: parts of the tensor {name} are missing. Run the training stage again.")
    if all(part.shape[1:] == shape[1:] for part in parts.values()):
        return Lazy.stored(shape, dtype, *(extent for offset in sorted(parts) for extent in parts[offset].extents))
    return Lazy(shape, dtype, partial(_assemble, shape, dtype, parts))


def _assemble(shape: tuple[int, ...], dtype: torch.dtype, parts: Mapping[tuple[int, ...], Lazy]) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    for offset, part in parts.items():
        whole[tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))] = part.read()
    return whole


# Names ------------------------------------------------------------------------------------------------------------------------------


def open_model(folder: Path) -> dict[str, Lazy]:
    """The weights of a Hugging Face folder by their names in the model (`model.state_dict()`), fused as the model has them.

    Tied tensors are there once, under the name the others are tied to. What the model has no place for keeps its name.

    Raises:
        DataError: a weight file or the config is missing or damaged, or some experts are missing.
    """
    model = outline(folder)
    return _tied_once(model, _named_as_modules(model, get_model_conversion_mapping(model), open_folder(folder)))


def to_hugging_face(folder: Path, tensors: Tensors) -> dict[str, Lazy]:
    """Tensors named as in the model that the folder's config describes, by the names and in the shapes in which checkpoints are published.

    What was done to the folder's own weights to load them is undone or, if it has none, what is usual for the model. Tied tensors are
    there once, buffers that are not kept not at all, and what the model has no place for as it was; all in the order in which
    `save_pretrained` writes them. Experts that share a fused tensor follow each other, and the fused one that was read last is kept:
    read them in this order.

    Raises:
        DataError: the folder's config, or a weight file of its, is damaged.
    """
    model = outline(folder)
    return _named_as_published(model, _transforms_of(model, folder), _tied_once(model, _kept(model, tensors)))


def outline(folder: Path) -> PreTrainedModel:
    """The model that a folder's config describes, without numbers (on the meta device).

    Raises:
        DataError: transformers has no model for it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        own_code = "trust_remote_code" in str(error)
        reason = "it needs the Python code in its folder, which is never run" if own_code else error
        raise DataError(f"{folder / 'config.json'}: describes no model that transformers can load: {reason}") from None


def _transforms_of(model: PreTrainedModel, folder: Path) -> list[WeightTransform]:
    """What became of the folder's weights when they were loaded; without weights, what is usual for the model."""
    if not all(file.is_file() for file in weight_files(folder)):
        return [one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)]
    transforms = get_model_conversion_mapping(model)
    _named_as_modules(model, transforms, open_folder(folder))
    return [one for one in transforms if one.was_used()]


def _kept(model: PreTrainedModel, tensors: Tensors) -> dict[str, Lazy]:
    """Without what is computed anew when the model is loaded."""
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys() | set(model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in tensors.items() if name not in computed}


def _tied_once(model: PreTrainedModel, tensors: Tensors) -> dict[str, Lazy]:
    """One name of those that are tied; all if, against the config, their numbers differ: transformers does not tie them then."""
    found = dict(tensors)
    for name, source in model.all_tied_weights_keys.items():
        if name in found and source not in found:
            found[source] = found.pop(name)
        elif name in found and found[name].shape == found[source].shape and torch.equal(found[name].read(), found[source].read()):
            del found[name]
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: a name, and the pattern of the converter that makes what is there; None if it only changes its name."""

    target: str
    pattern: str | None


def _named_as_modules(model: PreTrainedModel, transforms: Iterable[WeightTransform], tensors: Tensors) -> dict[str, Lazy]:
    renamings, converters = _kinds(transforms)
    wanted, prefix = model.state_dict(), model.base_model_prefix

    def place(name: str) -> _Place:
        found = _Place(*rename_source_key(name, renamings, converters, prefix, wanted))
        if found.target not in wanted and name in wanted:
            found = _Place(*rename_source_key(name, [], [], prefix, wanted))
        return found if found.target in wanted else _Place(name, None)

    named = _converted(model, converters, place, tensors)
    for name, tensor in named.items():
        if name in wanted and wanted[name].numel() != math.prod(tensor.shape):
            raise DataError(f"tensor {name} is {list(tensor.shape)}, not {list(wanted[name].shape)} as config.json says.")
    return named


def _named_as_published(model: PreTrainedModel, transforms: Sequence[WeightTransform], tensors: Tensors) -> dict[str, Lazy]:
    renamings, converters = _kinds(transform.reverse_transform() for transform in reversed(transforms))
    known = model.state_dict()

    def place(name: str) -> _Place:
        if name not in known:
            return _Place(name, None)
        target, pattern = apply_converters(name, converters)
        return _Place(target if pattern else apply_renamings(name, renamings), pattern)

    return _converted(model, converters, place, tensors, lambda name: apply_renamings(name, renamings))


def _kinds(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    listed = list(transforms)
    return [one for one in listed if isinstance(one, WeightRenaming)], [one for one in listed if isinstance(one, WeightConverter)]


def _converted(
    model: PreTrainedModel,
    converters: Iterable[WeightConverter],
    place: Callable[[str], _Place],
    tensors: Tensors,
    renamed: Callable[[str], str] = lambda name: name,
) -> dict[str, Lazy]:
    """Tensors at their places; what converters make is `renamed`. Shapes are learned by converting tensors without numbers."""
    groups: dict[str, list[_Member]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        to = place(name)
        groups.setdefault(to.target, []).append(_Member(name, to.pattern, tensors[name]))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    last = _last_made()
    found: dict[str, Lazy] = {}
    for target, members in groups.items():
        if members[0].pattern is None:
            found[target] = members[0].tensor
            continue
        convert = partial(_convert, model, by_pattern[members[0].pattern], target, members)
        for name, made in _outlined(target, convert).items():
            found[renamed(name)] = Lazy(tuple(made.shape), made.dtype, partial(lambda convert, name: last(convert)[name], convert, name))
    return found


@dataclass(frozen=True, slots=True)
class _Member:
    """A tensor of a group that is converted together."""

    name: str
    pattern: str | None
    tensor: Lazy


Convert = Callable[[Callable[[Lazy], torch.Tensor]], dict[str, torch.Tensor]]
"""Converts a group; is told how to read."""


def _convert(
    model: PreTrainedModel, converter: WeightConverter, target: str, members: Iterable[_Member], read: Callable[[Lazy], torch.Tensor]
) -> dict[str, torch.Tensor]:
    job = deepcopy(converter)
    for member in members:
        job.add_tensor(target, member.name, member.pattern or "", partial(read, member.tensor))  # pyright: ignore[reportArgumentType]
    made = job.convert(target, model=model, config=model.config)
    return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def _outlined(target: str, convert: Convert) -> dict[str, torch.Tensor]:
    """What will be made, without numbers."""
    try:
        return convert(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"the tensors of {target} do not fit each other: {error}. Some may be missing; copy the model again.") from None


def _last_made() -> Callable[[Convert], dict[str, torch.Tensor]]:
    """Converts a group unless it was the last one; what was made before is forgotten first."""
    held: dict[Convert, dict[str, torch.Tensor]] = {}

    def made(convert: Convert) -> dict[str, torch.Tensor]:
        if convert not in held:
            held.clear()
            held[convert] = convert(lambda tensor: tensor.read())
        return held[convert]

    return made
