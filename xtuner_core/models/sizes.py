"""How large a model is, told from its config and the headers of its weight files: no torch, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from xtuner_core.checkpoint.hf import missing_files, weight_files
from xtuner_core.config import TrainConfig
from xtuner_core.errors import DataError
from xtuner_core.models.check import read_config

Json = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
_EXPERTS = (".experts.", ".router.", ".mlp.gate.")
"""Parts of a mixture of experts that are no `nn.Linear` in transformers: neither adapters nor 4 bits reach them."""


@dataclass(frozen=True, slots=True)
class Widths:
    """What a decoder layer is made of, in numbers a token: `query` and `key` are heads · head width; `inner` is the width inside the
    MLP, of all experts that a token visits; `copies` is how many experts get a copy of the token.
    """

    hidden: int
    layers: int
    heads: int
    query: int
    key: int
    inner: int
    vocabulary: int
    copies: int
    normed_heads: bool
    gated: bool


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters. `trained_root`, `frozen_root`: those outside of the decoder layers. `linear`: frozen ones that method qlora
    packs into 4 bits. `products`: those that a token is multiplied with (of experts the active share), `products_trained` of these the
    trained.
    """

    trained: int
    frozen: int
    trained_root: int
    frozen_root: int
    linear: int
    products: float
    products_trained: float

    @property
    def total(self) -> int:
        """All of them, adapters too."""
        return self.trained + self.frozen


@dataclass(frozen=True, slots=True)
class Model:
    """A model by its sizes: widths, and the shape of every tensor, tied ones once."""

    widths: Widths
    shapes: Shapes
    active: float
    """Share of the experts that a token visits."""


def model_of_folder(folder: Path) -> Model | None:
    """From `config.json` and the weight files' headers; None if it is no decoder in known words.

    Raises:
        RecipeError, DataError: the config or a weight file is damaged.
    """
    if missing_files(folder):
        return None
    config = read_config(folder / "config.json")
    shapes = {name: shape for file in weight_files(folder) for name, shape in _shapes_in(file).items()}
    return _model(config, _without_tied_head(shapes, config))


def _shapes_in(file: Path) -> Shapes:
    """By the file's header alone: safetensors would check it, but imports numpy, for which `xtuner plan` does not wait."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            described = json.loads(opened.read(min(length, LARGEST_HEADER)))
        return {name: tuple(one["shape"]) for name, one in described.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a whole safetensors file ({error}). Copy it again.") from None


def model_of_config(config: Json) -> Model | None:
    """From the fields of a `config.json` alone, as a preset has them; None if it is no decoder in known words."""
    return _model(config, None)


def _model(config: Json, shapes: Shapes | None) -> Model | None:
    text = {**config, **(config.get("text_config") or {})}
    try:
        widths = _widths(text)
    except (KeyError, TypeError):  # TypeError: a list with a number for each layer
        return None
    experts = _experts(text)
    active = text.get("num_experts_per_tok", 1) / experts if experts else 1.0
    return Model(widths, shapes if shapes is not None else shapes_of(text, widths), active)


def _experts(config: Json) -> int:
    return next((config[name] for name in ("num_experts", "n_routed_experts", "num_local_experts") if config.get(name)), 0)


def _widths(config: Json) -> Widths:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    visited = config.get("num_experts_per_tok", 1) if _experts(config) else 0
    width = config.get("moe_intermediate_size") or config.get("intermediate_size") or 4 * config["hidden_size"]
    return Widths(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        query=heads * head,
        key=(config.get("num_key_value_heads") or heads) * head,
        inner=width * (visited + config.get("n_shared_experts", 0) if visited else 1),
        vocabulary=config["vocab_size"],
        copies=visited,
        normed_heads=config.get("model_type", "").startswith(("qwen3", "gemma3", "olmo2")),
        gated=config.get("model_type") not in ("gpt2", "gpt_neox", "phi", "opt", "falcon", "bloom", "starcoder2"),
    )


def shapes_of(config: Json, widths: Widths) -> Shapes:
    """The tensors of the Llama family and its mixtures of experts; vectors of other families may be missing, which is nothing."""
    w, layer = widths, {}
    layer |= {"self_attn.q_proj": (w.query, w.hidden), "self_attn.k_proj": (w.key, w.hidden)}
    layer |= {"self_attn.v_proj": (w.key, w.hidden), "self_attn.o_proj": (w.hidden, w.query)}
    layer |= {"input_layernorm": (w.hidden,), "post_attention_layernorm": (w.hidden,)}
    if experts := _experts(config):
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        layer |= {"mlp.gate": (experts, w.hidden)}
        layer |= {"mlp.experts.gate_up_proj": (experts, 2 * inner, w.hidden), "mlp.experts.down_proj": (experts, w.hidden, inner)}
    else:
        layer |= {"mlp.gate_proj": (w.inner, w.hidden), "mlp.up_proj": (w.inner, w.hidden), "mlp.down_proj": (w.hidden, w.inner)}
    shapes: Shapes = {f"model.layers.{number}.{name}.weight": shape for number in range(w.layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (w.vocabulary, w.hidden), "lm_head.weight": (w.vocabulary, w.hidden)}
    return _without_tied_head(shapes | {"model.norm.weight": (w.hidden,)}, config)


def _without_tied_head(shapes: Shapes, config: Json) -> Shapes:
    tied = config.get("tie_word_embeddings", False)
    return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


def count(model: Model, train: TrainConfig) -> Parameters:
    """What is trained and what is frozen under a method."""
    sizes = {name: prod(shape) for name, shape in model.shapes.items()}
    products = {name: size * (model.active if ".experts." in name else 1) for name, size in sizes.items() if _multiplies(name, model)}
    if train.method == "full":
        frozen = {name for name in sizes if any(fnmatchcase(name, pattern) for pattern in train.freeze)}
        adapters = {}
    else:
        frozen = set(sizes)
        adapters = {name: _adapter(shape, train) for name, shape in model.shapes.items() if _is_target(name, shape, train)}
    trained = {name: size for name, size in sizes.items() if name not in frozen} | adapters
    return Parameters(
        trained=sum(trained.values()),
        frozen=sum(sizes[name] for name in frozen),
        trained_root=sum(size for name, size in trained.items() if ".layers." not in name),
        frozen_root=sum(sizes[name] for name in frozen if ".layers." not in name),
        linear=sum(sizes[name] for name in frozen if _is_linear(name, model.shapes[name])),
        products=sum(products.values()),
        products_trained=sum(size for name, size in products.items() if name not in frozen) + sum(adapters.values()),
    )


def _multiplies(name: str, model: Model) -> bool:
    """An embedding is looked up, unless it is the head as well."""
    tied = not any("lm_head" in other or "embed_out" in other for other in model.shapes)
    return len(model.shapes[name]) >= 2 and (tied or not any(word in name for word in ("embed_tokens", "wte", "embed_in")))


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not any(word in name for word in (*_VOCABULARY, *_EXPERTS))


def _is_target(name: str, shape: tuple[int, ...], train: TrainConfig) -> bool:
    layer, targets = name.removesuffix(".weight"), train.lora.targets
    return _is_linear(name, shape) and (targets == ("all-linear",) or any(layer == one or layer.endswith(f".{one}") for one in targets))


def _adapter(shape: tuple[int, ...], train: TrainConfig) -> int:
    """A low-rank pair beside a weight `[out, in]`; DoRA keeps the length of each output row as well."""
    return train.lora.rank * sum(shape) + (shape[0] if train.lora.dora else 0)
