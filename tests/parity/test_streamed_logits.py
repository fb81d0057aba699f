"""The forward pass that reads each weight where it is used, against transformers' own of the whole model in memory: the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_architectures import ARCHITECTURES, TINY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.errors import DataError
from xtuner_core.export.tensors import Lazy, open_folder
from xtuner_core.export.verify import largest_difference, logits

PROBES = [list(range(5, 45)), list(range(3, 20)), list(range(60, 110))]


def build(values: dict[str, Any], folder: Path) -> PreTrainedModel:
    """A random model, its config.json in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **values}), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.config.save_pretrained(folder)
    return model


def counted(model: torch.nn.Module, reads: list[str]) -> dict[str, Lazy]:
    """The model's tensors, each under every name it has; the name is noted when one is read."""

    def lazy(name: str, tensor: torch.Tensor) -> Lazy:
        return Lazy(tuple(tensor.shape), tensor.dtype, lambda: (reads.append(name), tensor)[1])

    return {name: lazy(name, tensor.detach()) for name, tensor in model.state_dict().items()}


def together(model: Any) -> list[torch.Tensor]:
    rows = torch.zeros(len(PROBES), max(map(len, PROBES)), dtype=torch.long)
    for row, probe in zip(rows, PROBES, strict=True):
        row[: len(probe)] = torch.tensor(probe)
    with torch.inference_mode():
        found = model(input_ids=rows, use_cache=False).logits
    return [found[number, : len(probe)] for number, probe in enumerate(PROBES)]


def alone(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([probe]), use_cache=False).logits[0] for probe in PROBES]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_each_weight_read_once(name: str, tmp_path: Path) -> None:
    model = build(ARCHITECTURES[name], tmp_path)
    reads: list[str] = []
    tensors = counted(model, reads)
    found = logits(tmp_path, tensors, PROBES)
    assert_equal(found, together(model))
    assert largest_difference(alone(model), found) <= 2e-6, "probes must not see each other"
    assert sorted(reads) == sorted(tensors)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_may_be_stored_under_either_name(kept: str, tmp_path: Path) -> None:
    model = build(ARCHITECTURES["llama3"], tmp_path)
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors = {name: lazy for name, lazy in counted(model, []).items() if name not in tied - {kept}}
    assert_equal(logits(tmp_path, tensors, PROBES), together(model))


def test_a_folder_of_bfloat16_is_the_model_that_transformers_loads(tmp_path: Path) -> None:
    build(ARCHITECTURES["gemma3"], tmp_path).bfloat16().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, local_files_only=True).eval()
        found = logits(tmp_path, open_folder(tmp_path), PROBES, dtype=dtype)
        assert_equal(found, [logits.float() for logits in together(loaded)])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_base_and_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    base, reads = build(ARCHITECTURES["qwen3"], tmp_path), []
    tensors = counted(base, reads)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    found = logits(tmp_path, tensors, PROBES, adapter=tmp_path / "adapter")
    assert_equal(found, together(adapted))
    assert largest_difference(found, logits(tmp_path, tensors, PROBES)) > 0.01, "the adapter must do something"
    assert sorted(reads) == sorted([*tensors, *tensors])


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    tensors = counted(build(ARCHITECTURES["qwen3"], tmp_path), [])
    cut = {**tensors, "model.norm.weight": Lazy.of(torch.ones(7))}
    with pytest.raises(DataError, match=r"tensor model\.norm\.weight is \[7\] instead of \[32\]"):
        logits(tmp_path, cut, PROBES)
    del cut["model.norm.weight"]
    with pytest.raises(DataError, match=r"tensor model\.norm\.weight is missing"):
        logits(tmp_path, cut, PROBES)
