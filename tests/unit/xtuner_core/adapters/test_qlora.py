"""A 4-bit base: gradients against the same weights dequantized, a validation pass without a trace, what is said without bitsandbytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from xtuner_core import trainer
from xtuner_core.adapters.lora import add_lora
from xtuner_core.adapters.qlora import prepare
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import LoraConfig, SftConfig, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.loss import require_packable
from xtuner_core.models.load import load_model
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

IDS = torch.arange(60).reshape(2, 30)
VARIANTS = {"lora": LoraConfig(rank=4, alpha=12), "dora": LoraConfig(rank=4, alpha=12, dora=True)}


def quantized(folder: Path, lora: LoraConfig, dtype: str = "fp32") -> PreTrainedModel:
    """Built as the trainer does, with adapters that already do something (B starts as zeros)."""
    train = TrainConfig.model_validate({"method": "qlora", "lora": lora, "dtype": dtype})
    model = load_model(folder, train)
    require_packable(model)
    prepare(model, train, seed=3)
    torch.manual_seed(4)
    for name, tensor in trained_tensors(model).items():
        if "lora_B" in name:
            tensor.normal_(std=0.1)
    model.set_attn_implementation("eager")
    return model.train()


def dequantized(model: PreTrainedModel, folder: Path, lora: LoraConfig) -> PreTrainedModel:
    """The same model with ordinary linear layers that hold the values of the 4-bit ones."""
    plain = load_model(folder, TrainConfig(method="lora", lora=lora, dtype="fp32"))
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data.copy_(values)
    add_lora(plain, lora, seed=3)
    plain.load_state_dict(trained_tensors(model), strict=False)
    plain.set_attn_implementation("eager")
    return plain.train()


def packed_bytes(module: Linear4bit) -> torch.Tensor:
    """Two weights a byte, whatever type they are stored as."""
    return module.weight.data.view(torch.uint8)


def step(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and the gradient of every trained parameter."""
    model.zero_grad()
    (loss := model(input_ids=IDS, labels=IDS).loss).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), {name: grad.clone() for name, grad in grads.items() if grad is not None}


def test_every_linear_layer_but_the_head_is_nf4_with_double_quantization(tiny_model_folder: Path) -> None:
    model = quantized(tiny_model_folder, VARIANTS["lora"])
    packed = {name.removesuffix(".base_layer"): module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    plain = load_model(tiny_model_folder, TrainConfig())
    assert packed.keys() == {n for n, module in plain.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    for module in packed.values():
        assert (module.weight.quant_state.quant_type, module.weight.quant_state.nested) == ("nf4", True)
        assert packed_bytes(module).numel() == module.in_features * module.out_features / 2 and not module.weight.requires_grad
    assert {tensor.dtype for tensor in trained_tensors(model).values()} == {torch.float32}
    assert model.num_parameters() - sum(t.numel() for t in trained_tensors(model).values()) == plain.num_parameters()


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_those_of_the_dequantized_model(tiny_model_folder: Path, name: str) -> None:
    model = quantized(tiny_model_folder, VARIANTS[name])
    loss, grads = step(model)
    expected_loss, expected = step(dequantized(model, tiny_model_folder, VARIANTS[name]))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert grads.keys() == expected.keys() == trained_tensors(model).keys()
    for tensor, grad in expected.items():
        assert (grads[tensor] - grad).abs().max() <= 1e-5 * grad.abs().max(), tensor


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_validation_pass_leaves_loss_and_gradients_as_they_were(tiny_model_folder: Path, dtype: str) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes would put the weights into another layout for good."""
    model = quantized(tiny_model_folder, VARIANTS["lora"], dtype)
    loss, grads = step(model)
    model.eval()
    with torch.no_grad():
        measured = model(input_ids=IDS, labels=IDS).loss
    model.train()
    again, after = step(model)
    assert torch.equal(loss, measured) and torch.equal(loss, again)
    assert grads.keys() == after.keys() == trained_tensors(model).keys()
    assert all(torch.equal(grads[name], after[name]) for name in grads)


def test_a_run_moves_only_the_adapters(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[PreTrainedModel] = []
    build = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *arguments: (result := build(*arguments), built.append(result[0]))[0])
    config = sft_config(method="qlora")
    trainer.train(config, world, stop)
    final = load_whole(config.work_dir / "final")
    assert final and all(".lora_" in name for name in final)
    untouched = load_model(config.model_dir, config.train)
    for name, module in untouched.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(packed_bytes(module), packed_bytes(built[0].get_submodule(name).base_layer)), name


def test_without_bitsandbytes_the_error_says_what_to_install(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r'needs bitsandbytes .*: pip install "xtuner-pipeline\[qlora\]"\.'):
        load_model(tiny_model_folder, TrainConfig(method="qlora"))
