"""An adapter in a trainer's checkpoint, as a folder that peft loads.

Its tensors tell the rank and the layers, not how the update is scaled, nor beside which model it was trained: that is in the config which
the older tool family leaves in the file, as Python text. Literals are looked up in it; it is never run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xtuner_core.adapters.lora import save_adapter
from xtuner_core.checkpoint.hf import weight_keys
from xtuner_core.config import LoraConfig, TrainConfig
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.pth_names import prefixes
from xtuner_core.export.tensors import Tensors
from xtuner_core.models.check import is_finite, some

_PART = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
"""Layer, what it is, and the adapter's own name, which peft leaves out of its files."""
_PEFT = "base_model.model."
Parts = Mapping[tuple[str, str], str]
"""Layer and kind → name in the file."""


def write_adapter(
    tensors: Tensors, config: str, base: str | None, alpha: int | None, folder: Path, source: Path, log: Callable[[str], None]
) -> None:
    """Write `folder` from the tensors of one adapter; see `pth.convert_pth`.

    Raises:
        RecipeError: base or alpha are neither given nor in the config.
        DataError: not exactly one adapter, not one of this base, or not finite.
    """
    parts = _parts(tensors, source)
    prefix = _prefix({layer for layer, _ in parts}, Path(base) if base and Path(base).is_dir() else None, source)
    named = {(layer[len(prefix) :], kind): tensors[name] for (layer, kind), name in parts.items()}
    shapes = {part: tensor.shape for part, tensor in named.items()}
    lora = LoraConfig(
        rank=_rank(shapes, source),
        alpha=_told("alpha", alpha, config, "lora_alpha", source),
        rslora=literals(config, "use_rslora") == {True},
        dora=any(kind == "lora_magnitude_vector" for _, kind in named),
    )
    base_name = _told("base", base, config, "pretrained_model_name_or_path", source)
    if Path(base_name).is_dir():
        _require_fit(shapes, Path(base_name), source)
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor.read())]:
        raise DataError(f"{source}: NaN or infinity in {some(bad)}. Take an earlier checkpoint.")
    train = TrainConfig(lora=lora)
    save_adapter({_saved_name(*part): tensor for part, tensor in named.items()}, train, base_name, folder)
    log(f"{source.name}: an adapter of rank {lora.rank}, alpha {lora.alpha}, for {base_name}" + (f"; named {prefix}…" if prefix else ""))


def literals(text: str, name: str) -> set[Any]:
    """Every value that Python text gives `name`, as keyword, variable or key, where it is written out."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    pairs: list[tuple[Any, ast.expr]] = []
    for node in nodes:
        match node:
            case ast.keyword(arg=key, value=value) | ast.Assign(targets=[ast.Name(id=key)], value=value):
                pairs.append((key, value))
            case ast.Dict(keys=keys, values=values):
                pairs += [(key.value, value) for key, value in zip(keys, values, strict=True) if isinstance(key, ast.Constant)]
    return {value.value for key, value in pairs if key == name and isinstance(value, ast.Constant)}


def _told(option: str, given: Any, config: str, name: str, source: Path) -> Any:
    found = literals(config, name)
    if given is None and len(found) != 1:
        why = f"its config has several ({', '.join(sorted(map(str, found)))})" if found else "it has no config that says it"
        raise RecipeError(f"{source}: the adapter's tensors do not tell its {option}, and {why}: give --{option}.")
    return given if given is not None else found.pop()


def _parts(tensors: Tensors, source: Path) -> Parts:
    found = {name: _PART.fullmatch(name) for name in tensors}
    if other := sorted(name for name, part in found.items() if part is None):
        raise DataError(f"{source}: beside an adapter there are weights that belong to none: {some(other)}. Save the adapter alone.")
    adapters = {part[3] for part in found.values() if part}
    if len(adapters) > 1:
        raise DataError(f"{source}: ambiguous: several adapters: {some(sorted(map(str, adapters)))}. Save one alone.")
    return {(part[1], part[2]): name for name, part in found.items() if part}


def _prefix(layers: set[str], base: Path | None, source: Path) -> str:
    """What stands before the layers' names in the base model; without a base, what peft puts there must end it."""
    if base is None:
        peft = [prefix for prefix in prefixes(layers) if prefix.endswith(_PEFT)]
        if not peft:
            raise RecipeError(f"{source}: its names do not tell where the model's own begin ({min(layers)}): give --base as a folder.")
        return peft[0]
    known = {name.removesuffix(".weight") for name in weight_keys(base)}
    prefix = min(prefixes(layers), key=lambda prefix: len({layer[len(prefix) :] for layer in layers} - known))
    if unknown := sorted({layer[len(prefix) :] for layer in layers} - known):
        raise DataError(f"{source}: not an adapter for {base}; layers that it does not have: {some(unknown)}.")
    return prefix


Shapes = Mapping[tuple[str, str], tuple[int, ...]]


def _rank(shapes: Shapes, source: Path) -> int:
    """Of every pair of matrices, `[rank, in]` and `[out, rank]`."""
    kinds: dict[str, set[str]] = {}
    for layer, kind in shapes:
        kinds.setdefault(layer, set()).add(kind)
    if alone := sorted(layer for layer, held in kinds.items() if {kind[-1] for kind in held} - {"r"} != {"A", "B"}):
        raise DataError(f"{source}: layers with half an adapter: {some(alone)}. Copy the file again.")
    ranks = {shape[0] if kind[-1] == "A" else shape[1] for (_, kind), shape in shapes.items() if kind[-1] in "AB" and len(shape) == 2}
    if len(ranks) != 1:
        raise DataError(f"{source}: its matrices have ranks {some(sorted(map(str, ranks)))}; one rank for all layers is needed.")
    return ranks.pop()


def _require_fit(shapes: Shapes, base: Path, source: Path) -> None:
    wanted = {name.removesuffix(".weight"): shape for name, (shape, _) in weight_keys(base).items()}
    wrong = []
    for (layer, kind), shape in shapes.items():
        if kind in ("lora_A", "lora_B") and (shape[1] != wanted[layer][1] if kind[-1] == "A" else shape[0] != wanted[layer][0]):
            wrong.append(f"{layer}.{kind} is {shape}, the base's weight {wanted[layer]}")
    if wrong:
        raise DataError(f"{source}: not an adapter for {base}: {some(wrong)}. Name the base it was trained on.")


def _saved_name(layer: str, kind: str) -> str:
    return f"{layer}.{kind}.weight" if kind in ("lora_A", "lora_B") else f"{layer}.{kind}"
