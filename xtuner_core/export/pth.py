"""Checkpoints of other trainers, `.pth` files and DeepSpeed folders, as a Hugging Face folder or an adapter in peft's format.

What wrapped the model while it trained stands before its tensors' names (`module.llm.base_model.model.…`). Nothing is guessed: words of
wrappers are stripped as far as the names are then those of the base model, and what fits nowhere is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from xtuner_core.checkpoint.hf import complaint, copy_texts, missing_files
from xtuner_core.durable import drafted
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export import torch_files
from xtuner_core.export.deepspeed import open_zero
from xtuner_core.export.pth_adapter import write_adapter
from xtuner_core.export.pth_names import LAYER_WRAPPERS, prefixes
from xtuner_core.export.tensors import Lazy, Tensors, open_folder, write_folder
from xtuner_core.models.check import BENIGN, is_finite, read_config, require_own_tensors, some
from xtuner_core.progress import shown

Log = Callable[[str], None]


def convert_pth(
    source: Path, target: Path, base: str | None, alpha: int | None, dtype: torch.dtype | None, max_shard_size: str, log: Log
) -> None:
    """Write the adapter or the model in `source` as the folder `target`.

    `base` is the folder of the base model, demanded for a whole model; for an adapter a name will do, and what is None is looked up in the
    config that the file was trained with. A whole model gets the base's config and tokenizer, and its tensor types unless `dtype` says
    otherwise.

    Raises:
        RecipeError: the base or alpha is not known, or something is at `target`.
        DataError: the file is no checkpoint, is damaged, would run code, or is not of this base model.
        StorageError: reading or writing failed.
    """
    tensors, text = _open(source, log)
    typed = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    with drafted(target) as draft:
        if any(".lora_" in name for name in tensors):
            write_adapter(typed, text, base, alpha, draft, source, log)
        else:
            _write_model(tensors, base, draft, source, dtype, max_shard_size, log)


def _open(source: Path, log: Log) -> tuple[dict[str, Lazy], str]:
    """The tensors, by name without layer wrappers, and the text of the config they were trained with, if the file has it."""
    if not source.exists():
        raise RecipeError(f"{source}: there is no such file or folder.")
    if source.is_dir():
        found, content = open_zero(source)
    else:
        content = torch_files.load(source)
        found = {name: Lazy.of(tensor) for name, tensor in torch_files.state_dict(content, source).items()}
    if inner := sorted({wrapper for name in found for wrapper in LAYER_WRAPPERS.findall(name)}):
        log(f"{source.name}: left out of its names: {', '.join(inner)}")
    tensors = {LAYER_WRAPPERS.sub("", name): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise DataError(f"{source}: ambiguous: some tensors differ only in the wrappers in their names.")
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    return tensors, text if isinstance(text, str) else ""


# A whole model ----------------------------------------------------------------------------------------------------------------------


def _write_model(
    tensors: Tensors, base: str | None, folder: Path, source: Path, dtype: torch.dtype | None, max_shard_size: str, log: Log
) -> None:
    if base is None:
        raise RecipeError(f"{source}: holds a whole model; --base must name the folder of the model that was trained, for its config.")
    wanted = _open_base(Path(base))
    prefix, fitted = _fit(tensors, wanted, source)
    log(f"{source.name}: {len(fitted)} tensors of a whole model" + (f", named {prefix}…" if prefix else ""))
    typed = {name: _finite(name, tensor.to(dtype or wanted[name].dtype), source) for name, tensor in fitted.items()}
    folder.mkdir()
    with shown(sum(tensor.bytes for tensor in typed.values())) as wrote:
        write_folder(typed, folder, max_shard_size, wrote)
    copy_texts(Path(base), folder, str(dtype)[6:] if dtype else None)
    if _is_known(read_config(folder / "config.json")["model_type"]):
        require_own_tensors(folder)


def _finite(name: str, tensor: Lazy, source: Path) -> Lazy:
    def read() -> torch.Tensor:
        found = tensor.read()
        if not is_finite(found):
            raise DataError(f"{source}: NaN or infinity in {name} as {tensor.dtype}. Take an earlier checkpoint, or --dtype float32.")
        return found

    return Lazy(tensor.shape, tensor.dtype, read)


def _open_base(folder: Path) -> Tensors:
    if not folder.is_dir():
        raise RecipeError(f"--base: {folder}: there is no such folder.")
    if missing_files(folder) not in ([], ["tokenizer.json"]):  # an older model has a tokenizer of another form
        raise RecipeError(f"--base: {folder} {complaint(folder)}")
    weights = open_folder(folder)
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in weights.items() if not tensor.dtype.is_floating_point]:
        raise RecipeError(f"--base: {folder}: is quantized: {some(odd)}. Name the model it was made from.")
    return weights


def _is_known(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _fit(tensors: Tensors, wanted: Tensors, source: Path) -> tuple[str, Tensors]:
    """The wrappers' prefix and the tensors under the base's names: exactly those, in their shapes and order."""
    prefix = min(prefixes(tensors), key=lambda prefix: len(wanted.keys() ^ {name[len(prefix) :] for name in tensors}))
    named = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    wrong = {
        "missing": [name for name in wanted if name not in named],
        "too many": [name for name in named if name not in wanted and not _is_spare(name, named)],
        "of another shape": [
            f"{name} {named[name].shape}, the base's {tensor.shape}"
            for name, tensor in wanted.items()
            if name in named and named[name].shape != tensor.shape
        ],
    }
    if told := "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names):
        without = f" without {prefix!r}" if prefix else ""
        raise DataError(f"{source}: its tensors{without} are not those of the base model: {told}. Name the base it was trained on.")
    return prefix, {name: named[name] for name in wanted}


_HEADS = ("lm_head.weight", "output.weight")


def _is_spare(name: str, named: Tensors) -> bool:
    """Whether it is a buffer that models compute, or a head that is the embedding under a second name."""
    twins = [other for other, tensor in named.items() if other != name and tensor.shape == named[name].shape and name in _HEADS]
    return name.endswith(BENIGN) or any(torch.equal(named[name].read(), named[twin].read()) for twin in twins)
