"""Checkpoints of DeepSpeed ZeRO 1, 2 and 3: the fp32 weights that its optimizer keeps, put together from the parts of all ranks.

The layout is that of deepspeed/utils/zero_to_fp32.py (DeepSpeed 0.19.8), which reads it with unrestricted pickles and in one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xtuner_core.errors import DataError
from xtuner_core.export import torch_files
from xtuner_core.export.tensors import Lazy
from xtuner_core.models.check import some

_FILE = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_(?P<kind>model|optim)_states\.pt")
_LATEST = "latest"
Parts = Sequence[torch.Tensor]


def open_zero(folder: Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """Weights by name, and whatever else rank 0 saved beside them (`meta` of the older tool family).

    Frozen weights, which ZeRO keeps apart, are left out beside an adapter's.

    Raises:
        DataError: files or ranks are missing, torn, split by tensor or pipeline parallelism, or not laid out like this.
    """
    folder = _tagged(folder)
    models, optimizers = _files(folder)
    first = _load(models[0])
    if not optimizers:
        return {name: Lazy.of(tensor) for name, tensor in torch_files.state_dict(first, models[0]).items()}, first
    try:
        return _consolidate(first, models, optimizers), first
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"{folder}: not laid out as DeepSpeed does ({type(error).__name__}: {error}). Copy the folder again.") from None


def _tagged(folder: Path) -> Path:
    """The checkpoint that the file `latest` names, or the folder itself."""
    latest = folder / _LATEST
    tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if tag and (Path(tag).name != tag or not (folder / tag).is_dir()):
        raise DataError(f"{latest}: names {tag!r}, which is no folder beside it. Name the checkpoint's own folder.")
    return folder / tag


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of model and optimizer, by rank."""
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for file in sorted(folder.glob("*_states.pt")):
        name = _FILE.fullmatch(file.name)
        if not name or int(name["part"]):
            raise DataError(f"{file}: the model was split by tensor, pipeline or expert parallelism, which is not put together here.")
        found[name["kind"]][int(name["rank"] or 0)] = file
    if not found["model"]:
        raise DataError(f"{folder}: no checkpoint of DeepSpeed; it has no *_model_states.pt.")
    return _by_rank(found["model"], folder), _by_rank(found["optim"], folder)


def _by_rank(files: Mapping[int, Path], folder: Path) -> list[Path]:
    missing = sorted(set(range(max(files, default=-1) + 1)) - set(files))
    if missing:
        raise DataError(f"{folder}: the files of rank {some(list(map(str, missing)))} are missing. Copy the whole folder.")
    return [files[rank] for rank in sorted(files)]


def _load(file: Path) -> dict[str, Any]:
    content = torch_files.load(file)
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__}, not a checkpoint of DeepSpeed.")
    return content


def _consolidate(first: dict[str, Any], models: list[Path], optimizers: list[Path]) -> dict[str, Lazy]:
    states = [_load(file)["optimizer_state_dict"] for file in optimizers]
    counted = states[0]["partition_count"]
    world = max(counted) if isinstance(counted, list) else counted
    if world != len(states):
        raise DataError(f"{optimizers[0].parent}: written by {world} ranks, but the optimizer files of {len(states)} are there.")
    whole = _whole_at_stage_3 if states[0]["zero_stage"] == 3 else _whole_at_stage_2
    trained = dict(whole(first["param_shapes"], states))
    buffers = {name: Lazy.of(_float32(first["module"][name])) for name in first["buffer_names"] if name in first["module"]}
    frozen = {} if any(".lora_" in name for name in trained) else _frozen(first, models, states[0]["zero_stage"])
    found = {**buffers, **frozen, **trained}
    return found | {name: found[twin] for name, twin in (first.get("shared_params") or {}).items() if twin in found}


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _frozen(first: dict[str, Any], models: list[Path], stage: int) -> dict[str, Lazy]:
    """Parameters that the optimizer does not know: whole in ZeRO 1 and 2, in one part a rank in ZeRO 3."""
    shapes = first.get("frozen_param_shapes") or {}
    held = [(first if number == 0 else _load(file))["frozen_param_fragments"] for number, file in enumerate(models) if shapes]
    return {
        name: _lazy(shape, held[0][name].dtype, partial(_joined, [part[name].flatten() for part in held[: None if stage == 3 else 1]]))
        for name, shape in shapes.items()
    }


def _joined(parts: Parts) -> torch.Tensor:
    return torch.cat(list(parts))


def _lazy(shape: torch.Size, dtype: torch.dtype, read: Any) -> Lazy:
    """A parameter cut from flat numbers, behind which there may be padding."""
    size = tuple(shape)
    return Lazy(size, dtype, lambda: read()[: math.prod(size)].view(size))


def _whole_at_stage_2(groups: list[Mapping[str, torch.Size]], states: list[dict[str, Any]]) -> Iterator[tuple[str, Lazy]]:
    """Every group of parameters is one row of numbers, cut into one part a rank."""
    paddings = states[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        parts = [state["single_partition_of_fp32_groups"][number] for state in states]
        place = 0
        for index, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            yield name, _lazy(shape, parts[0].dtype, partial(cut, parts, place, count))
            place += count + (paddings[number][index] if paddings else 0)
        _require_used_up(place, sum(map(len, parts)), 2 * len(states))


def _whole_at_stage_3(groups: list[Mapping[str, torch.Size]], states: list[dict[str, Any]]) -> Iterator[tuple[str, Lazy]]:
    """Every parameter is cut into one part a rank, the last one padded; a rank's parts lie behind each other."""
    ranks = [state["fp32_flat_groups"] for state in states]
    place = 0
    for shapes in groups:
        for name, shape in shapes.items():
            count = -(-math.prod(shape) // len(ranks))
            yield name, _lazy(shape, ranks[0][0].dtype, partial(_gathered, ranks, place, count))
            place += count
    _require_used_up(place, sum(map(len, ranks[0])), 1)


def _gathered(ranks: Sequence[Parts], start: int, count: int) -> torch.Tensor:
    return torch.cat([cut(parts, start, count) for parts in ranks])


def cut(parts: Parts, start: int, count: int) -> torch.Tensor:
    """`count` numbers from `start` on, of flat tensors that are thought to lie behind each other."""
    found = []
    for part in parts:
        found.append(part[max(start, 0) : max(start + count, 0)])
        start -= len(part)
    return torch.cat(found)


def _require_used_up(used: int, there: int, alignment: int) -> None:
    """Both rounded up: how much padding lies behind the last parameter cannot be told exactly (see zero_to_fp32.py)."""
    if -(-used // alignment) != -(-there // alignment):
        raise ValueError(f"its parameters have {used} numbers, its files {there}")
