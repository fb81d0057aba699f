"""Our adapters against peft's own model, and the folder we save in peft's hands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.adapters.lora import add_lora, peft_config, save_adapter
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.config import LoraConfig, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.export.tensors import Lazy
from xtuner_core.models.load import load_model

CONFIGS = {
    "all-linear": LoraConfig(rank=4, alpha=12),
    "two-targets": LoraConfig(rank=2, alpha=2, targets=("q_proj", "down_proj")),
    "one-layer": LoraConfig(rank=2, alpha=4, targets=("layers.1.self_attn.v_proj", "o_proj")),
    "rslora": LoraConfig(rank=4, alpha=6, rslora=True),
    "dora": LoraConfig(rank=4, alpha=12, dora=True),
    "rslora and dora": LoraConfig(rank=4, alpha=6, rslora=True, dora=True),
}
IDS = torch.arange(60).reshape(2, 30)


def adapted(folder: Path, lora: LoraConfig) -> PreTrainedModel:
    """The tiny model with adapters that already do something (B starts as zeros)."""
    model = load_model(folder, TrainConfig(method="lora", lora=lora, dtype="fp32"))
    model.set_attn_implementation("eager")
    add_lora(model, lora, seed=3)
    torch.manual_seed(4)
    for name, tensor in trained_tensors(model).items():
        if "lora_B" in name:
            tensor.normal_(std=0.1)
        if "magnitude" in name:
            tensor.mul_(torch.rand_like(tensor) + 0.5)
    return model


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_pefts(tiny_model_folder: Path, name: str) -> None:
    ours = adapted(tiny_model_folder, CONFIGS[name])
    theirs = get_peft_model(plain(tiny_model_folder), peft_config(CONFIGS[name]))
    weights = {f"base_model.model.{name}": tensor for name, tensor in trained_tensors(ours).items()}
    trainable = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == weights.keys()
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            expected = trainable[f"base_model.model.{name}"].grad
            assert expected is not None and (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_all_linear_is_every_linear_layer_but_the_head(tiny_model_folder: Path) -> None:
    adapted_layers = {name.split(".lora_")[0] for name in trained_tensors(adapted(tiny_model_folder, CONFIGS["all-linear"]))}
    linear = {name for name, module in plain(tiny_model_folder).named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted_layers == linear - {"lm_head"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_saved_folder_gives_the_same_logits_in_peft(tiny_model_folder: Path, tmp_path: Path, name: str) -> None:
    ours = adapted(tiny_model_folder, CONFIGS[name]).eval()
    trained = {name: Lazy.of(tensor) for name, tensor in trained_tensors(ours).items()}
    save_adapter(trained, TrainConfig(method="lora", lora=CONFIGS[name]), "the/base", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain(tiny_model_folder), str(tmp_path / "adapter")).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "the/base"
    with torch.no_grad():
        expected, found = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
        base = plain(tiny_model_folder)(input_ids=IDS).logits
    assert (expected - base).abs().max() > 0.01 * base.abs().max()  # the adapter is no bystander
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_seed_decides_the_adapter_on_every_rank(tiny_model_folder: Path) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        model = load_model(tiny_model_folder, TrainConfig(method="lora"))
        add_lora(model, LoraConfig(), seed)
        return trained_tensors(model)

    one, same, other = fresh(1), fresh(1), fresh(2)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}  # beside a base in bf16
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_means_the_papers_formula(tiny_model_folder: Path, name: str) -> None:
    lora, ours, expected = CONFIGS[name], adapted(tiny_model_folder, CONFIGS[name]).eval(), plain(tiny_model_folder)
    tensors = trained_tensors(ours)
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    with torch.no_grad():
        for layer in {tensor.split(".lora_")[0] for tensor in tensors}:
            weight = expected.get_submodule(layer).weight
            weight += scale * tensors[f"{layer}.lora_B.default.weight"] @ tensors[f"{layer}.lora_A.default.weight"]
            if lora.dora:
                weight *= (tensors[f"{layer}.lora_magnitude_vector.default.weight"] / weight.norm(dim=1))[:, None]
        assert (ours(input_ids=IDS).logits - (logits := expected(input_ids=IDS).logits)).abs().max() <= 1e-5 * logits.abs().max()


def test_dora_starts_as_the_base_model(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, TrainConfig(dtype="fp32"))
    model.set_attn_implementation("eager")
    add_lora(model, CONFIGS["dora"], seed=3)
    with torch.no_grad():
        found, expected = model(input_ids=IDS).logits, plain(tiny_model_folder)(input_ids=IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("targets", [("qproj",), ("q_proj", "qproj"), ("q_proj", "qproj", "self_attn"), ("qproj", "all-linear")])
def test_each_unknown_target_lists_the_linear_layers(tiny_model_folder: Path, targets: tuple[str, ...]) -> None:
    told = r"train\.lora\.targets: 'qproj' matches no linear layer\. The linear layers are: down_proj, gate_proj, k_proj, lm_head,"
    with pytest.raises(RecipeError, match=told):
        add_lora(load_model(tiny_model_folder, TrainConfig()), LoraConfig(targets=targets), 0)


def test_a_tied_head_cannot_be_a_target(tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="this model's head is its embedding"):
        add_lora(load_model(tiny_model_folder, TrainConfig()), LoraConfig(targets=("q_proj", "lm_head")), 0)


def test_targets_are_a_word_several_or_a_list() -> None:
    for given, meant in (
        ("q_proj", ("q_proj",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (["a"], ("a",)),
        ("all-linear", ("all-linear",)),
    ):
        assert LoraConfig.model_validate({"targets": given}).targets == meant
    for wrong in ([], "", "a,", [""]):
        with pytest.raises(ValidationError):
            LoraConfig.model_validate({"targets": wrong})
