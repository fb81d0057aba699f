"""What is looked at before a model's folder is trained on: transformers would load some of it without a word, as another model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_core.checkpoint.hf import require_whole, weight_files, weight_keys
from xtuner_core.errors import DataError, RecipeError

if TYPE_CHECKING:
    import torch

SHOWN = 8
"""Tensors that a message names."""
BENIGN = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of buffers that older versions saved and models compute by themselves."""


def require_usable(folder: Path) -> None:
    """Refuse a folder whose weights are torn, are not the tensors of its config, or hold NaN or infinity.

    Reads every weight file once and keeps none of it.

    Raises:
        RecipeError: transformers cannot build a model of this config, or the tokenizer has ids beyond the embedding.
        DataError: a weight file is damaged, a tensor missing, unknown, of another shape, or not finite; the message names them.
    """
    require_whole(folder)
    require_room(read_config(folder / "config.json"), folder)
    require_own_tensors(folder)
    require_finite(folder)


def require_own_tensors(folder: Path) -> None:
    """Refuse weights that are not exactly the tensors of the config: transformers draws what is missing or does not fit at random.

    The model is built and compared without memory for its weights (device meta), with the same renamings as when it is loaded.

    Raises:
        RecipeError: transformers cannot build or load such a model.
        DataError: the tensors differ.
    """
    from transformers import AutoModelForCausalLM

    if "quantization_config" in read_config(folder / "config.json"):  # what its quantizer makes of the tensors is its own matter
        return
    with without_report():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RecipeError(f"{folder}: transformers cannot load this model: {reason}") from None
    info, stored = loaded[1], weight_keys(folder)
    told = [f"{name} is {_shape(found)} and should be {_shape(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])]
    told += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    unknown = [name for name in info["unexpected_keys"] if not name.endswith(BENIGN)]
    told += [f"{name} {_shape(stored[name][0]) if name in stored else ''} has no place" for name in sorted(unknown)]
    if told:
        raise DataError(
            f"{folder}: the weights are not those of its config.json: {some(told)}. Training would begin from random numbers there. "
            "Copy config and weights of one and the same model."
        )


@contextmanager
def without_report() -> Iterator[None]:
    """transformers prints a table of what we are about to tell, and a progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def require_finite(folder: Path) -> None:
    """Refuse weights with NaN or infinity (DataError names the tensors)."""
    from safetensors import safe_open

    bad = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            bad += [name for name in tensors.keys() if not is_finite(tensors.get_tensor(name))]  # noqa: SIM118
    if bad:
        raise DataError(
            f"{folder}: NaN or infinity in {some(sorted(bad))}. Training cannot repair such weights; copy the model again, or take an "
            "earlier checkpoint of it."
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity.

    By smallest and largest value, which a NaN spoils; no memory is needed, and it runs at the speed of reading.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    numbers = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats cannot be compared
    return all(bool(edge.isfinite()) for edge in numbers.aminmax())


def require_room(config: dict[str, Any], tokenizer: Path) -> None:
    """Refuse a tokenizer that writes ids the model has no embedding for."""
    from xtuner_core.data.tokenize import load_tokenizer

    size, room = len(load_tokenizer(tokenizer).is_special), config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if isinstance(room, int) and size > room:
        raise RecipeError(
            f"{tokenizer}: the tokenizer has {size} ids (up to {size - 1}), the model's vocab_size is {room}: ids beyond it have no "
            "embedding. Give the tokenizer that belongs to the model, or a config with a larger vocab_size."
        )


def read_config(file: Path) -> dict[str, Any]:
    """The fields of a `config.json`.

    Raises:
        RecipeError: there is none, or it is not a model's.
        DataError: not JSON.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{file}: there is no such config.") from None
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error}). Copy the model's config again.") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise RecipeError(f"{file}: not a model's config; it needs a model_type, as every config.json of transformers has.")
    return fields


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def some(names: list[str]) -> str:
    """The names for a message: the first few, and how many more."""
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
