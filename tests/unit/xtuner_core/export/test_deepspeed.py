"""Folders of DeepSpeed ZeRO become the fp32 weights that its optimizer held."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM
from zero_layout import Weights, write_zero

from xtuner_core.errors import DataError
from xtuner_core.export.deepspeed import cut, open_zero
from xtuner_core.export.pth import convert_pth

LAYOUTS = [(stage, world) for stage in (1, 2, 3) for world in (1, 2, 3, 8)]


def example() -> tuple[list[Weights], Weights, Weights]:
    """Two groups of parameters of odd sizes, frozen ones and buffers."""
    torch.manual_seed(1)
    decayed = {"a.weight": torch.randn(5, 7), "b.weight": torch.randn(3, 3, 2), "c.weight": torch.randn(1, 1)}
    return [decayed, {"a.bias": torch.randn(5), "norm": torch.randn(11)}], {"f": torch.randn(4, 3)}, {"steps": torch.arange(3)}


@pytest.mark.parametrize(("stage", "world"), LAYOUTS)
def test_the_parts_of_all_ranks_are_the_weights(stage: int, world: int, tmp_path: Path) -> None:
    groups, frozen, buffers = example()
    write_zero(tmp_path / "iter_9.pth", stage, world, groups, frozen, buffers, {"twin": "a.weight"}, meta={"cfg": "x = 1"})
    found, beside = open_zero(tmp_path / "iter_9.pth")
    wanted = {**groups[0], **groups[1], **frozen, **buffers, "twin": groups[0]["a.weight"]}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(found[name].read(), tensor)
    assert beside["meta"] == {"cfg": "x = 1"}


def test_latest_names_the_checkpoint(tmp_path: Path) -> None:
    groups, frozen, buffers = example()
    write_zero(tmp_path / "iter_9.pth", 2, 2, groups, frozen, buffers, {})
    (tmp_path / "latest").write_text("iter_9.pth\n")
    assert torch.equal(open_zero(tmp_path)[0]["norm"].read(), groups[1]["norm"])
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(DataError, match=r"latest: names '\.\./elsewhere', which is no folder beside it"):
        open_zero(tmp_path)


def test_without_an_optimizer_the_module_is_the_model(tmp_path: Path) -> None:
    torch.save({"module": {"a.weight": torch.ones(2)}, "param_shapes": None}, tmp_path / "mp_rank_00_model_states.pt")
    assert torch.equal(open_zero(tmp_path)[0]["a.weight"].read(), torch.ones(2))


def test_cut_reads_across_parts() -> None:
    parts = torch.arange(10).split([3, 0, 4, 3])
    for start in range(10):
        for count in range(11 - start):
            assert cut(parts, start, count).tolist() == list(range(start, start + count))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_whole_model_of_the_older_tool(stage: int, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    named = dict(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).named_parameters())
    trained = {f"llm.{name}": torch.randn_like(tensor) for name, tensor in named.items()}
    shared = {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}
    write_zero(tmp_path / "iter_9.pth", stage, 2, [trained], {}, {}, shared, meta={"cfg": ""})
    convert_pth(tmp_path / "iter_9.pth", tmp_path / "hf", str(tiny_model_folder), None, torch.float32, "5GB", print)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(trained[f"llm.{name}"], tensor) for name, tensor in loaded.named_parameters())


def test_an_adapter_leaves_its_frozen_base_behind(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)).eval()
    named = {f"llm.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    trained = {name: tensor for name, tensor in named.items() if "lora_" in name}
    frozen = {name: tensor for name, tensor in named.items() if name not in trained}
    write_zero(tmp_path / "iter_9.pth", 3, 3, [trained], frozen, {}, {}, meta={"cfg": "llm = dict(lora_alpha=16)"})
    convert_pth(tmp_path / "iter_9.pth", tmp_path / "adapter", str(tiny_model_folder), None, None, "5GB", print)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32), str(tmp_path / "adapter")
    )
    ours, theirs = get_peft_model_state_dict(again), get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Bad folders ------------------------------------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def copy_as(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(folder / "mp_rank_00_model_states.pt", folder / name)


def forget(key: str) -> Callable[[Path], object]:
    return lambda folder: rewrite(folder / "mp_rank_00_model_states.pt", lambda content: content.pop(key))


class Code:
    def __reduce__(self) -> Any:
        return os.getpid, ()


def longer(content: dict[str, Any]) -> None:
    content["param_shapes"] = [OrderedDict(x=torch.Size([40])), content["param_shapes"][1]]


OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt".format
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model": (drop("mp_rank_00_model_states.pt"), r"no checkpoint of DeepSpeed; it has no \*_model_states.pt"),
    "a rank in the middle": (drop(OPTIMIZER(1)), "the files of rank 1 are missing"),
    "the last rank": (drop(OPTIMIZER(2)), "written by 3 ranks, but the optimizer files of 2 are there"),
    "tensor parallel": (copy_as("mp_rank_01_model_states.pt"), "mp_rank_01_model_states.pt: the model was split by tensor, pipeline"),
    "pipeline": (copy_as("layer_00-model_states.pt"), "layer_00-model_states.pt: the model was split"),
    "no shapes": (forget("param_shapes"), r"not laid out as DeepSpeed does \(KeyError: 'param_shapes'\)"),
    "too many numbers": (
        lambda folder: rewrite(folder / "mp_rank_00_model_states.pt", longer), "its parameters have 40 numbers, its files 54",
    ),
    "torn": (lambda folder: os.truncate(folder / OPTIMIZER(1), 500), f"{OPTIMIZER(1)}: no whole file of torch.save"),
    "code": (lambda folder: torch.save({"x": Code()}, folder / OPTIMIZER(0)), "names posix.getpid"),
    "a list": (lambda folder: torch.save([1], folder / OPTIMIZER(0)), "holds a list, not a checkpoint of DeepSpeed"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_is_not_whole_is_refused(what: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    damage, complaint = BAD[what]
    write_zero(tmp_path / "iter_9.pth", 2, 3, *example(), {})
    damage(tmp_path / "iter_9.pth")
    with pytest.raises(DataError, match=complaint):
        convert_pth(tmp_path / "iter_9.pth", tmp_path / "hf", str(tiny_model_folder), None, None, "5GB", print)
    assert [file.name for file in tmp_path.iterdir()] == ["iter_9.pth"]
