"""Our streamed merge against peft's own in fp32, bit for bit, and against base + adapter where peft's own is known to differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from xtuner_core.adapters import qlora
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.export.merge import merge
from xtuner_core.export.tensors import Lazy, open_folder
from xtuner_core.models.load import load_model

IDS = torch.arange(60).reshape(2, 30)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "rslora and dora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {r"layers\.1\..*q_proj": 8},
        "alpha_pattern": {"down_proj": 3},
        "layers_to_transform": [1],
    },
    "biases": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings by dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 95]},
}


def make_base(folder: Path, config: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config or Qwen2Config(**SIZES, tie_word_embeddings=False), dtype=dtype)
    model.save_pretrained(str(folder), **options)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 2, dtype: torch.dtype | None = None, **settings: Any) -> Path:
    """An adapter that already does something (B starts as zeros)."""
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    (model.to(dtype) if dtype else model).save_pretrained(str(folder))
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload(safe_merge=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def require_bits(found: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    tensors = open_folder(found)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.read(), expected[name].to(dtype)), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_the_merge_is_pefts_rounded_once(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[name])
    expected = by_peft(base, adapter)
    assert (logits(expected) - logits(load(base))).abs().max() > 0.01
    for dtype in (None, torch.float32):
        made = tmp_path / f"merged-{dtype}"
        merge(base, [(adapter, 1.0)], made, dtype)
        require_bits(made, expected.state_dict(), dtype or torch.bfloat16)
        assert json.loads((made / "config.json").read_text())["torch_dtype"] == str(dtype or torch.bfloat16)[6:]
    assert torch.equal(logits(load(made)), logits(expected))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_weight_that_is_merged_in_blocks(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base", Qwen2Config(**{**SIZES, "hidden_size": 512, "intermediate_size": 6150, "num_hidden_layers": 1}))
    adapter = make_adapter(base, tmp_path / "adapter", r=16, target_modules=["up_proj", "down_proj"], use_dora=name == "dora")
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    require_bits(tmp_path / "merged", by_peft(base, adapter).state_dict(), torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_was_saved_with_the_adapter_is_the_models(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", Qwen2Config(**SIZES, tie_word_embeddings=tied))
    other = make_base(tmp_path / "other", Qwen2Config(**SIZES, tie_word_embeddings=tied, initializer_range=0.1))
    model = get_peft_model(load(other), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    expected = by_peft(base, tmp_path / "adapter").state_dict()
    require_bits(
        tmp_path / "merged", {name: tensor for name, tensor in expected.items() if not tied or name != "lm_head.weight"}, torch.float32
    )
    assert not torch.equal(expected["model.embed_tokens.weight"], load(base).model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_and_a_base_in_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", max_shard_size="20KB")
    adapter = make_adapter(base, tmp_path / "adapter", dtype=dtype, **CASES["lora"])
    merge(base, [(adapter, 1.0)], tmp_path / "merged", max_shard_size="30KB")
    require_bits(tmp_path / "merged", by_peft(base, adapter).state_dict(), torch.float32)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    merge(base, [(adapter, 1.0)], tmp_path / "again", max_shard_size="30KB")
    for file in (tmp_path / "merged").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_several_adapters_are_a_weighted_sum(base: Path, tmp_path: Path) -> None:
    one = make_adapter(base, tmp_path / "one", seed=3, **CASES["lora"])
    other = make_adapter(base, tmp_path / "other", seed=4, r=2, **{**CASES["rslora"], "target_modules": ["q_proj", "up_proj"]})
    merge(base, [(one, 0.75), (other, -0.3)], tmp_path / "merged", torch.float32)

    theirs = PeftModel.from_pretrained(load(base), str(one), adapter_name="one")
    theirs.load_adapter(str(other), "other")
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in (("one", 0.75), ("other", -0.3)):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    expected = theirs.merge_and_unload(safe_merge=True, adapter_names=["one", "other"])
    require_bits(tmp_path / "merged", expected.state_dict(), torch.float32)


@pytest.mark.parametrize("name", ["dora", "whole modules", "tokens"])
def test_what_replaces_weights_has_no_share(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[name])
    with pytest.raises(RecipeError, match="replaces weights instead of adding to them"):
        merge(base, [(adapter, 0.5)], tmp_path / "merged")
    with pytest.raises(RecipeError, match="replaces weights instead of adding to them"):
        merge(base, [(adapter, 1.0), (adapter, 1.0)], tmp_path / "merged")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_fused_experts(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in open_folder(base)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    by_peft(base, adapter).save_pretrained(str(tmp_path / "expected"))
    expected = {name: tensor.read() for name, tensor in open_folder(tmp_path / "expected").items()}
    require_bits(tmp_path / "merged", expected, torch.float32)
    changed = {name.split(".")[-2] for name, tensor in open_folder(base).items() if not torch.equal(tensor.read(), expected[name])}
    assert changed == ({"q_proj", "gate_proj", "up_proj", "down_proj"} if "target_parameters" in settings else {"q_proj", "o_proj"})


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": LINEAR}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 95]}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False),
    ],
    ids=["neither", "tokens", "embedding", "head", "whole head", "both whole"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights_part_where_only_one_of_them_changed(tmp_path: Path, settings: dict[str, Any], tied: bool) -> None:
    base = make_base(tmp_path / "base", Qwen2Config(**SIZES, tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(load(base), str(adapter)).eval())
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in open_folder(tmp_path / "merged")) is not tied


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_a_qlora_adapter_goes_into_the_base_it_was_trained_beside(tiny_model_folder: Path, tmp_path: Path, dtype: str) -> None:
    train = TrainConfig.model_validate({"method": "qlora", "dtype": dtype, "lora": {"rank": 4}})
    model = load_model(tiny_model_folder, train)
    qlora.prepare(model, train, seed=3)
    for name, tensor in trained_tensors(model).items():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    qlora.save_adapter({name: Lazy.of(tensor) for name, tensor in trained_tensors(model).items()}, train, "model", tmp_path / "adapter")
    told: list[str] = []
    merge(tiny_model_folder, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", torch.float32, say=told.append)
    assert len(told) == 1 and "quantized to 4 bits (NF4) and de-quantized again first" in told[0]

    stored = open_folder(tmp_path / "merged")
    layers: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14
    for path, layer in layers:
        packed = layer.get_base_layer().weight
        seen = dequantize_4bit(packed.data, packed.quant_state).float()
        assert torch.equal(stored[f"{path}.weight"].read(), seen + layer.get_delta_weight("default")), path
    assert torch.equal(stored["model.norm.weight"].read(), model.model.norm.weight.float())
    if dtype == "fp32":
        model.set_attn_implementation("eager")
        expected = logits(model.eval())
        assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= 1e-5 * expected.abs().max()
        merge(tiny_model_folder, [(tmp_path / "adapter", 1.0)], tmp_path / "other", torch.float32, quantized_base="none")
        assert (logits(load(tmp_path / "other")) - expected).abs().max() > 1e-3 * expected.abs().max()
