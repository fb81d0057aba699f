"""InternLM2 and 2.5 ↔ the llama form of the same model, which transformers knows without code from the model's folder.

Layout and names are those of modeling_internlm2.py, which InternLM publishes beside its weights: `wqkv` has for every key-value head the
rows of its query heads, then those of the key, then those of the value. All else differs in names alone. InternLM3 has a class of its own
in transformers 5 and needs no conversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner_core.checkpoint.hf import copy_texts, require_whole
from xtuner_core.durable import drafted, remove, write_json
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export import torch_files
from xtuner_core.export.adapter import CONFIG, WEIGHTS, open_adapter
from xtuner_core.export.internlm2_tokenizer import make_plain
from xtuner_core.export.tensors import Lazy, Tensors, open_folder, write_file, write_folder
from xtuner_core.models.check import read_config, require_own_tensors
from xtuner_core.progress import shown

Fields = Mapping[str, Any]
_MODULES = {
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
"""InternLM2's name of a module → llama's."""
_FUSED, _SPLIT = "attention.wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_theta", "dtype", "torch_dtype",
)  # fmt: skip
"""Fields of both configs."""
REMOTE_CODE = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}


@dataclass(frozen=True, slots=True)
class Heads:
    """How the rows of `wqkv` are shared out: `groups` key-value heads, `queries` query heads for each, `size` rows a head."""

    groups: int
    queries: int
    size: int

    @classmethod
    def of(cls, config: Fields) -> Heads:
        """From the fields of a config.json."""
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        return cls(groups, heads // groups, config.get("head_dim") or config["hidden_size"] // heads)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of query, key and value."""
        return self.groups * self.queries * self.size, self.groups * self.size, self.groups * self.size

    def split(self, fused: torch.Tensor, part: int) -> torch.Tensor:
        """Query, key or value (`part` 0, 1, 2), `[rows, …]`, of `wqkv`, `[all rows, …]`."""
        heads = fused.view(self.groups, self.queries + 2, self.size, *fused.shape[1:])
        chosen = heads[:, :-2] if part == 0 else heads[:, part - 3 : part - 2 or None]
        return chosen.reshape(self.rows[part], *fused.shape[1:])

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """`wqkv` of query, key and value."""
        rest = parts[0].shape[1:]
        heads = [part.view(self.groups, -1, self.size, *rest) for part in parts]
        return torch.cat(heads, dim=1).reshape(sum(self.rows), *rest)


def to_llama(source: Path, target: Path, max_shard_size: str, base: Path | None = None) -> None:
    """Write an InternLM2 folder as a llama folder; or an adapter of one, if `base` is the folder of its model, in either form.

    Raises:
        RecipeError: `source` is no such folder, or an adapter without `base`; or something is at `target`.
        DataError: its files are damaged, or not the tensors of its config.
    """
    if (source / CONFIG).is_file():
        return _adapter_to_llama(source, target, base)
    config = _require(source, "internlm2")
    with drafted(target) as draft:
        draft.mkdir()
        write_llama(source, config, draft, max_shard_size)


def write_llama(source: Path, config: Fields, folder: Path, max_shard_size: str = "5GB") -> None:
    """Fill the empty `folder`; see `to_llama`."""
    _write(_split(_open(source), Heads.of(config)), folder, max_shard_size)
    write_json(folder / "config.json", llama_config(config))
    copy_texts(source, folder)
    make_plain(folder)
    require_own_tensors(folder)


def from_llama(source: Path, target: Path, max_shard_size: str) -> None:
    """Write a llama folder as an InternLM2 folder; its readers need the Python files that InternLM publishes beside its weights.

    Raises:
        RecipeError: `source` is no llama folder, its attention is not one that InternLM2 has, or something is at `target`.
        DataError: its files are damaged, or not the tensors of its config.
    """
    config = _require(source, "llama")
    require_whole(source)
    require_own_tensors(source)
    with drafted(target) as draft:
        draft.mkdir()
        _write(dict(_joined(open_folder(source), Heads.of(config))), draft, max_shard_size)
        write_json(draft / "config.json", internlm2_config(config))
        copy_texts(source, draft)


def _require(folder: Path, model_type: str) -> Fields:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder.")
    config = read_config(folder / "config.json")
    if config["model_type"] != model_type:
        raise RecipeError(f"{folder}: a model of type {config['model_type']}; {model_type} is what can be converted here.")
    return config


def _write(tensors: Tensors, folder: Path, max_shard_size: str) -> None:
    with shown(sum(tensor.bytes for tensor in tensors.values())) as wrote:
        write_folder(tensors, folder, max_shard_size, wrote)


def _open(folder: Path) -> Tensors:
    """Weights in safetensors, or in the .bin files that InternLM published before."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        files = [(file, torch_files.load(file)) for file in pickles]
        return {name: Lazy.of(tensor) for file, held in files for name, tensor in torch_files.state_dict(held, file).items()}
    return open_folder(folder)


@contextmanager
def in_llama_form(base: Path, adapters: Sequence[Path], scratch: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folders themselves or, if `base` is an InternLM2 folder, its llama form and that of its adapters, in `scratch` for this block.

    Raises as `to_llama` does.
    """
    if read_config(base / "config.json")["model_type"] != "internlm2":
        yield base, list(adapters)
        return
    try:
        llama = scratch / base.resolve().name
        to_llama(base, llama, "5GB")
        yield llama, [_form_of(adapter, base, scratch / f"adapter{number}" / adapter.name) for number, adapter in enumerate(adapters)]
    finally:
        remove(scratch)


def _form_of(adapter: Path, base: Path, target: Path) -> Path:
    """In llama's form; one that was trained on it already is."""
    if not any(module in name for name in open_adapter(adapter).tensors for module in (_FUSED, *_MODULES)):
        return adapter
    _adapter_to_llama(adapter, target, base)
    return target


# Tensors ----------------------------------------------------------------------------------------------------------------------------


def _split(tensors: Tensors, heads: Heads) -> dict[str, Lazy]:
    """Under llama's names. What an adapter has before the rows, `lora_A`, is the same for query, key and value."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if _FUSED not in name:
            found[_renamed(name, _MODULES)] = tensor
            continue
        if ".lora_A." not in name and tensor.shape[0] != sum(heads.rows):
            raise DataError(f"{name}: has {tensor.shape[0]} rows; by the model's config {sum(heads.rows)} are query, key and value.")
        for part, module in enumerate(_SPLIT):
            found[name.replace(_FUSED, module)] = tensor if ".lora_A." in name else _rows(tensor, heads, part)
    return found


def _rows(fused: Lazy, heads: Heads, part: int) -> Lazy:
    return Lazy((heads.rows[part], *fused.shape[1:]), fused.dtype, lambda: heads.split(fused.read(), part))


def _joined(tensors: Tensors, heads: Heads) -> Iterator[tuple[str, Lazy]]:
    ours = {llama: name for name, llama in _MODULES.items()}
    for name, tensor in tensors.items():
        if _SPLIT[0] in name:
            parts = [tensors[name.replace(_SPLIT[0], module)] for module in _SPLIT]
            yield name.replace(_SPLIT[0], _FUSED), _fused(parts, heads)
        elif not any(module in name for module in _SPLIT):
            yield _renamed(name, ours), tensor


def _fused(parts: list[Lazy], heads: Heads) -> Lazy:
    shape = (sum(heads.rows), *parts[0].shape[1:])
    return Lazy(shape, parts[0].dtype, lambda: heads.join([part.read() for part in parts]))


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    pattern = "|".join(map(re.escape, modules))
    return re.sub(rf"(?<![\w])({pattern})(?=\.)", lambda found: modules[found[1]], name)


# Configs ----------------------------------------------------------------------------------------------------------------------------


def llama_config(config: Fields) -> dict[str, Any]:
    """The fields of config.json as llama has them; InternLM2's `bias` is that of the attention's projections alone."""
    scaling = config.get("rope_scaling")
    rope = {"rope_scaling": {"rope_type": scaling["type"], "factor": scaling["factor"]}} if scaling else {}
    return {
        **_shared(config), **rope, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.get("bias", True), "mlp_bias": False,
    }  # fmt: skip


def internlm2_config(config: Fields) -> dict[str, Any]:
    """The fields of config.json as InternLM2 has them.

    Raises:
        RecipeError: InternLM2 has no such bias, head size or scaling of positions.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    size = config["hidden_size"] // config["num_attention_heads"]
    if config.get("mlp_bias") or config.get("head_dim") not in (None, size) or kind not in ("default", "linear", "dynamic"):
        raise RecipeError("InternLM2 has no bias in its MLP, no heads of another size than hidden_size / heads, and no such rope scaling.")
    return {
        **_shared(config), "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "auto_map": REMOTE_CODE,
        "bias": config.get("attention_bias", False), "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
    }  # fmt: skip


def _shared(config: Fields) -> dict[str, Any]:
    return {name: config[name] for name in _SAME if name in config}


# Adapters ---------------------------------------------------------------------------------------------------------------------------


def _adapter_to_llama(source: Path, target: Path, base: Path | None) -> None:
    """One update of `wqkv` is three, of its rows; rank and scale stay."""
    if base is None:
        raise RecipeError(f"{source}: is an adapter: --base must name the folder of its model, for the number of heads.")
    heads, adapter = Heads.of(read_config(base / "config.json")), open_adapter(source)
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], str) or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise RecipeError(f"{source / CONFIG}: patterns of layers' names cannot be converted; name the target_modules one by one.")
    with drafted(target) as draft:
        draft.mkdir()
        write_file(draft / WEIGHTS, _split({name: Lazy.of(tensor) for name, tensor in adapter.tensors.items()}, heads))
        modules = {new for old in settings["target_modules"] for new in _llama_targets(old)}
        write_json(draft / CONFIG, {**settings, "target_modules": sorted(modules)})


def _llama_targets(module: str) -> list[str]:
    """The ends of llama's names for the end of one of InternLM2's."""
    table = {_FUSED.split(".")[-1]: list(_SPLIT), **{old.split(".")[-1]: [new] for old, new in _MODULES.items()}}
    return [new.split(".")[-1] for new in table.get(module.split(".")[-1], [module])]
