"""InternLM2's fused layout and llama's: the same tensors, the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sentencepiece_model import PIECES, sentencepiece_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipelines import base_model, production
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.checkpoint import outline
from xtuner_core.export.internlm2 import Heads, from_llama, to_llama
from xtuner_core.export.merge import merge
from xtuner_core.models import check

Weights = dict[str, torch.Tensor]
IDS = torch.arange(3, 40)[None]
CONFIG: dict[str, Any] = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    "rope_scaling": None, "bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def random_weights(config: dict[str, Any]) -> Weights:
    torch.manual_seed(4)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"]
    rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * size
    shapes = {"model.tok_embeddings.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (config["vocab_size"], hidden)
    for layer in (f"model.layers.{number}." for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}attention.wqkv.weight": (rows, hidden), f"{layer}attention.wo.weight": (hidden, hidden)}
        shapes |= {f"{layer}feed_forward.w{n}.weight": (inner, hidden) for n in (1, 3)} | {
            f"{layer}feed_forward.w2.weight": (hidden, inner)
        }
        shapes |= {f"{layer}attention_norm.weight": (hidden,), f"{layer}ffn_norm.weight": (hidden,)}
        if config["bias"]:
            shapes |= {f"{layer}attention.wqkv.bias": (rows,), f"{layer}attention.wo.bias": (hidden,)}
    return {name: torch.randn(shape) / 4 for name, shape in shapes.items()}


# As published in modeling_internlm2.py (InternLM, Apache-2.0), without cache and dropout -------------------------------------------


def internlm2(weights: Weights, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    hidden = weights["model.tok_embeddings.weight"][ids]
    for layer in (f"model.layers.{number}." for number in range(config["num_hidden_layers"])):
        hidden = hidden + attention(weights, layer + "attention.", config, norm(hidden, weights[f"{layer}attention_norm.weight"], config))
        inner = norm(hidden, weights[f"{layer}ffn_norm.weight"], config)
        w1, w2, w3 = (weights[f"{layer}feed_forward.w{number}.weight"] for number in (1, 2, 3))
        hidden = hidden + (torch.nn.functional.silu(inner @ w1.T) * (inner @ w3.T)) @ w2.T
    head = weights.get("output.weight", weights["model.tok_embeddings.weight"])
    return norm(hidden, weights["model.norm.weight"], config) @ head.T


def norm(hidden: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])


def attention(weights: Weights, name: str, config: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["hidden_size"] // heads, hidden.shape[1]
    fused = torch.nn.functional.linear(hidden, weights[f"{name}wqkv.weight"], weights.get(f"{name}wqkv.bias"))
    # rearrange(qkv_states, "b q (h gs d) -> b q h gs d", gs=2 + num_key_value_groups, d=head_dim)
    states = fused.view(*fused.shape[:2], groups, 2 + heads // groups, size)
    query = states[..., : heads // groups, :].flatten(2, 3)  # rearrange(query_states, "b q h gs d -> b q (h gs) d")
    key, value = (states[..., place, :].repeat_interleave(heads // groups, dim=2) for place in (-2, -1))
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    cos, sin = rotary(config, size, length)
    query, key = (one * cos + torch.cat([-one[..., size // 2 :], one[..., : size // 2]], -1) * sin for one in (query, key))
    scores = query @ key.transpose(-1, -2) / size**0.5 + torch.full((length, length), float("-inf")).triu(1)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(mixed, weights[f"{name}wo.weight"], weights.get(f"{name}wo.bias"))


def rotary(config: dict[str, Any], size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """InternLM2DynamicNTKScalingRotaryEmbedding where the config says dynamic."""
    base, scaling, known = config["rope_theta"], config["rope_scaling"], config["max_position_embeddings"]
    if scaling and length > known:
        base *= ((scaling["factor"] * length / known) - (scaling["factor"] - 1)) ** (size / (size - 2))
    angles = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, size, 2) / size))
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


# The tests --------------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with bias": {"bias": True},
    "every head its own key": {"num_key_value_heads": 6},
    "one key": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16, "rope_theta": 10000.0},
}


def folder_of(kind: str, folder: Path, tokenizer: Path) -> tuple[Weights, dict[str, Any]]:
    config = {**CONFIG, **KINDS[kind]}
    weights = random_weights(config)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    fields = json.loads((tokenizer / "tokenizer_config.json").read_text())
    remote = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, **remote}))
    return weights, config


@pytest.mark.parametrize("kind", KINDS)
def test_the_llama_form_computes_the_same(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    weights, config = folder_of(kind, tmp_path / "internlm2", tiny_model_folder)
    to_llama(tmp_path / "internlm2", tmp_path / "llama", "5GB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        ours, theirs = model(IDS).logits, internlm2(weights, config, IDS)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer("a½")["input_ids"] == AutoTokenizer.from_pretrained(tiny_model_folder)("a½")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_model(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    weights, config = folder_of(kind, tmp_path / "internlm2", tiny_model_folder)
    to_llama(tmp_path / "internlm2", tmp_path / "llama", "20KB")
    from_llama(tmp_path / "llama", tmp_path / "again", "5GB")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: saved[name] for name in config if name != "auto_map"} == {name: config[name] for name in config if name != "auto_map"}
    to_llama(tmp_path / "again", tmp_path / "llama again", "20KB")
    for file in (tmp_path / "llama").iterdir():
        assert file.read_bytes() == (tmp_path / "llama again" / file.name).read_bytes()


def test_rows_are_dealt_by_key_value_head() -> None:
    heads = Heads(groups=2, queries=2, size=1)
    fused = torch.arange(8)  # q0 q1 k0 v0 q2 q3 k1 v1
    assert [heads.split(fused, part).tolist() for part in range(3)] == [[0, 1, 4, 5], [2, 6], [3, 7]]
    assert torch.equal(heads.join([heads.split(fused, part) for part in range(3)]), fused)


def test_weights_that_were_published_as_bin(tiny_model_folder: Path, tmp_path: Path) -> None:
    weights, _ = folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    (tmp_path / "internlm2" / "model.safetensors").unlink()
    for number in (0, 1):
        part = {name: tensor for index, (name, tensor) in enumerate(weights.items()) if index % 2 == number}
        torch.save(part, tmp_path / "internlm2" / f"pytorch_model-0000{number + 1}-of-00002.bin")
    to_llama(tmp_path / "internlm2", tmp_path / "llama", "5GB")
    embedding = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").get_input_embeddings()
    assert torch.equal(embedding.weight, weights["model.tok_embeddings.weight"])


class Fused(torch.nn.Module):
    """The modules of InternLM2 that an adapter is put into, under its names."""

    def __init__(self, weights: Weights, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = {"model_type": "internlm2", "tie_word_embeddings": False}
        self.settings, self.plain = config, weights
        for name in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
            for number in range(config["num_hidden_layers"]):
                weight = weights[f"model.layers.{number}.{name}.weight"]
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.clone()
                place: torch.nn.Module = self
                for part in f"model.layers.{number}.{name}".split(".")[:-1]:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.add_module(name.split(".")[-1], linear)


def test_an_adapter_of_the_fused_form(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The adapter that the older tool trains (all linear layers) does the same beside the llama form."""
    weights, config = folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    to_llama(tmp_path / "internlm2", tmp_path / "llama", "5GB")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["wqkv", "wo", "w1", "w2", "w3"], init_lora_weights=False, task_type=None)
    adapted = get_peft_model(Fused(weights, config), lora)  # type: ignore[arg-type]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({name: one.contiguous() for name, one in get_peft_model_state_dict(adapted).items()}, adapter / "adapter_model.safetensors")
    lora.save_pretrained(str(adapter))
    to_llama(adapter, tmp_path / "adapter llama", "5GB", base=tmp_path / "internlm2")

    merged = adapted.merge_and_unload().state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    llama = PeftModel.from_pretrained(base, str(tmp_path / "adapter llama")).eval()
    with torch.no_grad():
        ours, theirs = llama(IDS).logits, internlm2({**weights, **merged}, config, IDS)
    assert float((ours - internlm2(weights, config, IDS)).abs().max()) > 0.1
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5

    for one, place in ((adapter, "merged"), (tmp_path / "adapter llama", "merged from llama's")):
        merge(tmp_path / "internlm2", [(one, 1.0)], tmp_path / "models" / place)
        with torch.no_grad():
            ours = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / place)(IDS).logits
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == ["merged", "merged from llama's"]


@pytest.mark.parametrize("look", [outline, check.require_own_tensors], ids=lambda look: look.__name__)
def test_nobody_is_asked_to_run_a_folder_s_code(
    look: Callable[[Path], object], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself would ask on the terminal, and run it on `y`."""
    folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    with pytest.raises((DataError, RecipeError), match=r"code in its folder, which is never run|transformers cannot load this model"):
        look(tmp_path / "internlm2")
    assert asked == []


def test_control_tokens_keep_the_ids_they_were_trained_with(tiny_model_folder: Path, tmp_path: Path) -> None:
    """InternLM2's vocabulary has placeholders at their ids; only tokenizer_config.json says what they are."""
    folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    file, config_file = (tmp_path / "internlm2" / name for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer, config = json.loads(file.read_text()), json.loads(config_file.read_text())
    model = tokenizer["model"]
    model["vocab"] |= {"[UNUSED": 256, "_1]": 257, "[UNUSED_1]": 258, "ab": 259}
    tokenizer |= {"added_tokens": None, "model": {**model, "merges": [["[UNUSED", "_1]"], ["a", "b"]]}}
    token = {"content": "<|im_start|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    file.write_text(json.dumps(tokenizer))
    names = {"bos_token": None, "eos_token": None, "pad_token": None, "additional_special_tokens": ["<|im_start|>"]}
    config_file.write_text(json.dumps({**config, **names, "added_tokens_decoder": {"258": token}}))
    to_llama(tmp_path / "internlm2", tmp_path / "llama", "5GB")
    for read in (
        AutoTokenizer.from_pretrained(tmp_path / "llama"),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "llama" / file.name)),
    ):
        assert (read("<|im_start|>ab")["input_ids"], len(read)) == ([258, 259], 260)


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tokenizer.model"])
def test_it_can_be_a_recipe_s_base(vocabulary: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    weights, config = folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    config["vocab_size"] = len(AutoTokenizer.from_pretrained(tiny_model_folder))
    if vocabulary == "tokenizer.model":  # the form in which InternLM publishes it
        (tmp_path / "internlm2" / "tokenizer.json").unlink()
        (tmp_path / "internlm2" / "tokenizer.model").write_bytes(sentencepiece_model(PIECES))
    weights |= {name: torch.randn(config["vocab_size"], 48) for name in ("model.tok_embeddings.weight", "output.weight")}
    save_file(weights, tmp_path / "internlm2" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "internlm2" / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("qwen3_tiny_full_openai", [f"model.base={tmp_path / 'internlm2'}"])
    made = Store(tmp_path / "store").produce(base_model.STAGE, recipe, {}, print).artifact
    assert made.metrics["architecture"] == "LlamaForCausalLM"
    embedding = AutoModelForCausalLM.from_pretrained(made.payload / "model").get_input_embeddings()
    assert torch.equal(embedding.weight, weights["model.tok_embeddings.weight"])
    assert torch.equal(load_file(tmp_path / "internlm2" / "model.safetensors")["output.weight"], weights["output.weight"])
    recipe = load_recipe("qwen3_tiny_full_openai", [f"eval.production={tmp_path / 'internlm2'}"])
    assert Store(tmp_path / "store").produce(production.STAGE, recipe, {}, print).artifact.digest == made.digest


def test_what_is_not_that_model_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    weights, _ = folder_of("plain", tmp_path / "internlm2", tiny_model_folder)
    source = tmp_path / "internlm2"

    def refused(kind: type[Exception], complaint: str, **weights: Weights) -> None:
        if weights:
            save_file(weights["weights"], source / "model.safetensors")
        with pytest.raises(kind, match=complaint):
            to_llama(source, tmp_path / "llama", "5GB")
        assert [file.name for file in tmp_path.iterdir()] == ["internlm2"]

    fused = "model.layers.1.attention.wqkv.weight"
    refused(DataError, f"{fused}: has 10 rows; by the model's config 80", weights={**weights, fused: torch.ones(10, 48)})
    refused(
        DataError,
        "model.layers.1.mlp.up_proj.weight is missing",
        weights={k: v for k, v in weights.items() if "1.feed_forward.w3" not in k},
    )
    refused(DataError, "vit.weight .* has no place", weights={**weights, "vit.weight": torch.ones(2)})
    (source / "model.safetensors").write_bytes(b"<html>")
    refused(DataError, "model.safetensors: not a whole safetensors file")
    with pytest.raises(RecipeError, match="a model of type qwen3; internlm2 is what"):
        to_llama(tiny_model_folder, tmp_path / "llama", "5GB")
    with pytest.raises(RecipeError, match="none: there is no such folder"):
        from_llama(tmp_path / "none", tmp_path / "llama", "5GB")
