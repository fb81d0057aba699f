"""Hugging Face model folders: written by transformers 5 so that 4.57 reads the same model, and inspected without loading weights.

What transformers 4.57 does with an untouched folder of transformers 5 (each seen, none of it reported by 4.57 unless noted):
rope parameters are looked up at the old place, so theta falls back to 10000; the number of a Qwen3 mixture's experts has another name
(an error); `TokenizersBackend` is unknown (an error); a list of `extra_special_tokens` is an error; `generate` is handed
`token_type_ids` (an error).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xtuner_core.durable import write_json
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Json = dict[str, Any]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write weights (safetensors, tied tensors once), config and generation config; run `make_portable` when the tokenizer is there too."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would be torn between the lines of the log
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def make_portable(folder: Path) -> None:
    """Edit the JSON files of a folder written by transformers 5 so that 4.57 and 5 load equal models; doing it twice changes nothing.

    Also drops what depends on the machine that wrote it, so that equal models are equal bytes.

    Raises:
        DataError: one of the files is not JSON.
    """
    _rewrite(folder / "config.json", _portable_config)
    _rewrite(folder / "tokenizer_config.json", _portable_tokenizer)
    _rewrite(folder / "generation_config.json", lambda config: _without(config, "_from_model_config"))


_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def copy_texts(base: Path, folder: Path, dtype: str | None = None) -> None:
    """Give weights the config, generation config, tokenizer, chat template and licence of the model they were made from.

    A file that is in `folder` already stays as it is; then `make_portable`. `dtype` ("bfloat16") is what config.json says of the weights.

    Raises:
        DataError: one of the files is not JSON.
    """
    for path in sorted(base.iterdir()):
        is_text = (path.suffix in _TEXTS and not path.name.endswith(".index.json")) or path.stem in ("LICENSE", "NOTICE")
        if is_text and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    if dtype:
        _rewrite(folder / "config.json", lambda config: _with_dtype(config, dtype))
    make_portable(folder)


def complete_generation_config(folder: Path, stops: Sequence[int]) -> None:
    """Write generation_config.json, or add to it, so that every server ends an answer at the model's own eos or at one of `stops`.

    Raises:
        DataError: a file is not JSON.
    """
    config, generation = _read(folder / "config.json"), read_generation_config(folder)
    known = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
    ends = list(dict.fromkeys([*eos_ids(known | generation), *stops]))
    eos = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    write_json(folder / GENERATION, known | generation | eos)


def read_generation_config(folder: Path) -> Json:
    """Its fields that say something; none without the file (DataError: not JSON)."""
    return {name: value for name, value in _read(folder / GENERATION).items() if value is not None}


def eos_ids(config: Json) -> list[int]:
    """Every token that ends an answer: one or several are given as one field."""
    ends = config.get("eos_token_id", [])
    return ends if isinstance(ends, list) else [ends]


def license_of(folder: Path) -> str | None:
    """A model's licence as the Hub names it: from the YAML header of its README.md, or the heading of its LICENSE; None if not known."""
    header = re.match(r"---\r?\n(.*?)\r?\n---", _text(folder / "README.md"), re.DOTALL)
    try:
        fields = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and isinstance(fields.get("license"), str):
        return fields["license"]
    heading = "".join(_text(file)[:200] for file in sorted(folder.glob("LICENSE*")))
    return next((name for pattern, name in _LICENSES.items() if re.search(pattern, heading)), None)


_LICENSES = {r"Apache License\s+Version 2\.0": "apache-2.0", r"MIT License": "mit"}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _read(file: Path) -> Json:
    """Empty if it is not there (DataError: not JSON)."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error}). Copy the model folder again.") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: must be a mapping, is {type(fields).__name__}. Copy the model folder again.")
    return fields


def _with_dtype(config: Json, dtype: str) -> Json:
    nested = {name: _with_dtype(value, dtype) for name, value in config.items() if _is_part(name, value) and "dtype" in value}
    return config | nested | {"dtype": dtype}


def _is_part(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, dict)


def _rewrite(file: Path, change: Callable[[Json], Json]) -> None:
    if file.is_file():
        write_json(file, change(_read(file)))


def _without(config: Json, *names: str) -> Json:
    return {name: value for name, value in config.items() if name not in names}


def _portable_config(config: Json) -> Json:
    nested = {name: _portable_config(value) for name, value in config.items() if _is_part(name, value)}
    dtype = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    experts = {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    return experts | config | nested | dtype | _old_rope(config.get("rope_parameters") or {})


def _old_rope(rope: Json) -> Json:
    """The same rotary embedding as 4.57 spells it; layer types with a rope each only as Gemma 3 has them."""
    if "full_attention" in rope:
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]} if "sliding_attention" in rope else {}
        return _old_rope(rope["full_attention"]) | local
    scaling = _without(rope, "rope_theta")
    named = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return named | ({"rope_scaling": scaling} if rope.get("rope_type", "default") != "default" else {})


def _portable_tokenizer(config: Json) -> Json:
    result = _without(config, "backend", "is_local", "local_files_only")
    if config.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    return result | {"model_input_names": ["input_ids", "attention_mask"]}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the folder's weights, whether they exist or not.

    Raises:
        DataError: the index is not readable, or names anything but safetensors files in the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index}: not a weight index ({error}). Copy the model folder again.") from None
    if foreign := [name for name in names if not str(name).endswith(".safetensors") or Path(name).name != name]:
        raise DataError(f"{index}: names {foreign[0]!r}, which is no safetensors file in this folder. Copy the model folder again.")
    return [folder / name for name in names]


def missing_files(folder: Path) -> list[str]:
    """What the folder lacks to be a complete model: config, tokenizer or weight files."""
    needed = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    return [file.name for file in needed if not file.is_file()]


PICKLES = ("*.bin", "*.pt", "*.pth")


def complaint(folder: Path) -> str | None:
    """Why a folder is no complete model, and what to do; None if every file is there. No weights are read."""
    missing = missing_files(folder)
    if not missing:
        return None
    if snapshots := hub_snapshots(folder):
        return f"is the root of a hub cache; name the snapshot in it: {' or '.join(map(str, snapshots))}."
    return f"is not a complete model folder: {', '.join(missing)} missing. {_advice(folder, missing)}"


def _advice(folder: Path, missing: list[str]) -> str:
    if SINGLE in missing and (pickles := sorted(file.name for kind in PICKLES for file in folder.glob(kind))):
        return (
            f"Its weights are pickle files ({', '.join(pickles[:3])}), which may run code and are never opened. Convert them once where "
            "you trust their source: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and copy the tokenizer."
        )
    if "config.json" in missing and (folder / "adapter_config.json").is_file():
        return "It is an adapter without its model; name the model it was trained on, or the merged one."
    inside = sorted(file.parent.name for file in folder.glob("*/config.json")) if "config.json" in missing else []
    found = f" There is a config.json in its folder {inside[0]}." if inside else ""
    return (
        "Needed: config.json, tokenizer.json and every safetensors file; name the folder that holds them, or copy or download it again."
        f"{found}"
    )


def hub_snapshots(folder: Path) -> list[Path]:
    """The model folders of a hub cache, or of one repository in it, newest first; of a repository with a `main` only that."""
    if (main := folder / "refs" / "main").is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        if (named / "config.json").is_file():
            return [named]
    patterns = ("snapshots/*/config.json", "models--*/snapshots/*/config.json", *(["*/config.json"] if folder.name == "snapshots" else []))
    found = [file.parent for pattern in patterns for file in folder.glob(pattern)]
    return sorted(found, key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)[:3]


def require_whole(folder: Path) -> None:
    """Refuse torn weight files, and an index that promises tensors which its files do not have.

    Raises:
        DataError: names the file, and the tensors.
    """
    held = {file.name: set(header(file)) for file in weight_files(folder)}
    index = folder / INDEX
    if not index.is_file():
        return
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if name not in held[file]:
            raise DataError(f"{folder / file}: the tensor {name} is not in it, though {INDEX} says so. Copy the model folder again.")


def weight_keys(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, safetensors dtype such as `BF16`) of every tensor, from the file headers alone.

    Raises:
        DataError: a weight file is missing or its header is damaged.
    """
    return {name: described for file in weight_files(folder) for name, described in header(file).items()}


def header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, safetensors dtype) of every tensor of a file, in the order of their bytes.

    Raises:
        DataError: the file is missing, damaged or shorter than it says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise DataError(f"{file}: missing. Copy the model folder again.") from None
    except SafetensorError as error:
        raise DataError(f"{file}: not a whole safetensors file ({error}). Copy it again.") from None
