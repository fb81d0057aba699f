"""Files of other trainers: what they wrote becomes the model or the adapter that was trained, and nothing else is believed."""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export import torch_files
from xtuner_core.export.pth import convert_pth
from xtuner_core.export.pth_adapter import literals
from xtuner_core.export.torch_files import Inert

Weights = dict[str, torch.Tensor]
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path) -> Weights:
    """The tiny model's weights after a training: other numbers, in float32."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    return tied({name: tensor + torch.randn_like(tensor) / 50 for name, tensor in model.state_dict().items()})


def tied(weights: Weights) -> Weights:
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def logits_of(folder: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def logits_with(weights: Weights, base: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(IDS).logits


def convert(source: Path, target: Path, base: object = None, alpha: int | None = None, dtype: Any = None) -> list[str]:
    told: list[str] = []
    convert_pth(source, target, str(base) if base else None, alpha, dtype, "5GB", told.append)
    return told


# Whole models -----------------------------------------------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[Weights], Any]] = {
    "bare": lambda weights: weights,
    "state_dict, llm.": lambda weights: {"state_dict": OrderedDict(prefixed(weights, "llm.")), "meta": {"epoch": 1}},
    "module, module.llm.": lambda weights: {"module": prefixed(weights, "module.llm."), "lr": 0.1},
    "model in state_dict": lambda weights: {"state_dict": {"model": prefixed(weights, "model.")}},
    "compiled, peft, lightning": lambda weights: prefixed(weights, "_forward_module._orig_mod.base_model.model."),
    "fsdp, each layer wrapped": lambda weights: {
        f"_fsdp_wrapped_module.{name.replace('self_attn.', '_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.')}": tensor
        for name, tensor in weights.items()
    },
    "with a buffer": lambda weights: {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_whole_model_whatever_wrapped_it(wrapping: str, trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save(WRAPPINGS[wrapping](trained), tmp_path / "iter_9.pth")
    convert(tmp_path / "iter_9.pth", tmp_path / "hf", tiny_model_folder, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.float32
    assert all(torch.equal(trained[name], tensor) for name, tensor in loaded.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "iter_9.pth"]


def test_it_computes_as_trained_and_speaks_as_the_base(trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save(prefixed(trained, "llm."), tmp_path / "a.pth")
    told = convert(tmp_path / "a.pth", tmp_path / "hf", tiny_model_folder, dtype=torch.float32)
    assert any("llm." in line for line in told)
    assert torch.equal(logits_of(tmp_path / "hf"), logits_with(trained, tiny_model_folder))
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", tiny_model_folder))
    assert ours.chat_template == theirs.chat_template and ours("a½")["input_ids"] == theirs("a½")["input_ids"]


def test_by_default_it_has_the_base_s_types(trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", tiny_model_folder)
    loaded, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "hf", tiny_model_folder))
    assert loaded.dtype == base.dtype
    assert all(torch.equal(trained[name].to(base.dtype), tensor) for name, tensor in loaded.state_dict().items())


def test_the_old_form_without_zip(trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": trained}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pth", tmp_path / "hf", tiny_model_folder, dtype=torch.float32)
    assert torch.equal(logits_of(tmp_path / "hf"), logits_with(trained, tiny_model_folder))


# Adapters ---------------------------------------------------------------------------------------------------------------------------

CONFIG = """
pretrained_model_name_or_path = 'internlm/internlm2-chat-1_8b'
model = dict(
    llm=dict(pretrained_model_name_or_path='internlm/internlm2-chat-1_8b', torch_dtype='torch.float16'),
    lora=dict(lora_alpha=16, lora_dropout=0.1, r=4, task_type='CAUSAL_LM', type='peft.LoraConfig'),
    type='xtuner.model.SupervisedFinetune')
max_epochs = 3
"""


def adapted(base: Path, **lora: Any) -> PeftModel:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **lora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) / 10
    return model.eval()


def adapted_logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def read_back(adapter: Path, base: Path) -> torch.Tensor:
    return adapted_logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)).eval())


ADAPTERS: dict[str, Callable[[PeftModel], Weights]] = {
    "as the older tool writes it": lambda model: prefixed(get_peft_model_state_dict(model), "llm."),
    "with the adapter's name": lambda model: {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name},
    "of the bare model": lambda model: {name[17:]: tensor for name, tensor in get_peft_model_state_dict(model).items()},
    "wrapped twice": lambda model: prefixed(get_peft_model_state_dict(model), "module._orig_mod.llm."),
}


@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter(form: str, kind: dict[str, bool], tiny_model_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model_folder, **kind)
    config = CONFIG.replace("lora_alpha=16", f"lora_alpha=16, use_rslora={'use_rslora' in kind}")
    torch.save({"state_dict": ADAPTERS[form](model), "meta": {"cfg": config}}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "adapter", tiny_model_folder)
    assert torch.equal(read_back(tmp_path / "adapter", tiny_model_folder), adapted_logits(model))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (4, 16, ["q_proj", "up_proj"])


def test_an_adapter_s_file_names_its_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": ADAPTERS["wrapped twice"](adapted(tiny_model_folder)), "meta": {"cfg": CONFIG}}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "internlm/internlm2-chat-1_8b"
    )


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("", "no config that says it: give --alpha"),
        ("lora = dict(lora_alpha=2 * r)", "no config that says it: give --alpha"),
        ("lora = dict(lora_alpha=8)\nother = {'lora_alpha': 16}", r"has several \(16, 8\): give --alpha"),
        ("lora = dict(lora_alpha=", "give --alpha"),
        ("lora = dict(lora_alpha=8)", "no config that says it: give --base"),
    ],
)
def test_what_its_tensors_do_not_tell_is_demanded(config: str, complaint: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": ADAPTERS["wrapped twice"](adapted(tiny_model_folder)), "meta": {"cfg": config}}, tmp_path / "a.pth")
    with pytest.raises(RecipeError, match=complaint):
        convert(tmp_path / "a.pth", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_config_is_looked_into_and_never_run() -> None:
    text = "import os\nlora = dict(r=8, lora_alpha=4)\nif True:\n    os.abort()\n{'lora_alpha': os.abort()}"
    assert literals(text, "lora_alpha") == {4}


# What mmengine writes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as mmengine's does, methods and numpy arrays included; the module is gone when the file is read."""
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values, self.count = np.ones(3), np.float64(2.0)

        def mean(self) -> None: ...

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


def test_a_file_of_the_old_train_command(
    history_buffer: type, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_model_folder)
    hub = {"log_scalars": OrderedDict({"train/loss": history_buffer()}), "runtime_info": OrderedDict(iter=np.int64(9)), "resumed_keys": {}}
    content = {
        "meta": {"cfg": CONFIG, "seed": 7, "experiment_name": "a_20240101", "epoch": 1, "iter": 9},
        "state_dict": prefixed(get_peft_model_state_dict(model), "llm."),
        "message_hub": hub,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "param_schedulers": [{"last_step": 9, "_global_step": 9}],
    }
    torch.save(content, tmp_path / "iter_9.pth")
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Exception, match="HistoryBuffer"):
        torch.load(tmp_path / "iter_9.pth", weights_only=True)
    convert(tmp_path / "iter_9.pth", tmp_path / "adapter")
    assert torch.equal(read_back(tmp_path / "adapter", tiny_model_folder), adapted_logits(model))
    assert not any(name.startswith("mmengine") for name in sys.modules)


# Bad files --------------------------------------------------------------------------------------------------------------------------


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "posix.mkdir"), (builtins.print, "print"), (np.save, "numpy.save")])
def test_a_file_with_code_is_refused_by_its_name(function: Any, name: str, zipped: bool, trained: Weights, tmp_path: Path) -> None:
    content = {"state_dict": trained, "x": Calls(function, str(tmp_path / "ran"), *([1] if function is np.save else []))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=rf"a\.pth: the file names {name}, .* Save the tensors alone"):
        convert(tmp_path / "a.pth", tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_a_stand_in_calls_nothing(tmp_path: Path) -> None:
    """`getattr` is let through by its name, as a stand-in: what it would get is never got, and cannot be called."""
    torch.save({"got": Calls(getattr, np.dtype, "name"), "array": np.arange(3)}, tmp_path / "a.pth")
    assert {type(value) for value in torch_files.load(tmp_path / "a.pth").values()} == {Inert}
    torch.save({"called": Calls("a".upper)}, tmp_path / "b.pth")  # pickled as getattr("a", "upper")()
    with pytest.raises(DataError, match=r"unrecognized function .*Inert"):
        torch_files.load(tmp_path / "b.pth")


def lacking(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name}


def with_nan(weights: Weights) -> Weights:
    return {**weights, "model.norm.weight": weights["model.norm.weight"] / 0 * 0}


BAD: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "a tensor missing": (lacking, r"not those of the base model: missing: model.layers.1.mlp.up_proj.weight. Name"),
    "one too many": (lambda weights: {**weights, "projector.weight": torch.ones(2)}, r"too many: projector.weight"),
    "two wrappers": (
        lambda weights: {("llm." if "layers.0" in name else "") + name: tensor for name, tensor in weights.items()},
        r"missing: model.layers.0.*; and \d+ more; too many: llm.model.layers.0",
    ),
    "another shape": (
        lambda weights: {**weights, "model.norm.weight": torch.ones(3)},
        r"of another shape: model.norm.weight \(3,\), the base's",
    ),
    "another head": (lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, "too many: lm_head.weight"),
    "NaN": (with_nan, "NaN or infinity in model.norm.weight"),
    "empty": (lambda weights: {"state_dict": {}, "meta": {}}, "the file holds state_dict; meta"),
    "nothing": (lambda weights: {}, "the file holds nothing"),
    "a list": (lambda weights: list(weights.values()), "holds a list, not tensors by name"),
    "sparse": (lambda weights: {**weights, "model.norm.weight": torch.eye(2).to_sparse()}, "not plain tensors: model.norm.weight"),
    "two models": (lambda weights: {"state_dict": weights, "model": weights}, "the file holds state_dict; model"),
    "names that become one": (lambda weights: {**weights, **prefixed(weights, "_orig_mod.")}, "ambiguous"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_model_that_is_not_the_base_s_is_refused(what: str, trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    make, complaint = BAD[what]
    torch.save(make(trained), tmp_path / "a.pth")
    with pytest.raises(DataError, match=complaint):
        convert(tmp_path / "a.pth", tmp_path / "hf", tiny_model_folder)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


BAD_ADAPTERS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "half": (lambda weights: {name: tensor for name, tensor in weights.items() if "0.mlp.up_proj.lora_B" not in name}, "half an adapter"),
    "of another model": (
        lambda weights: {name.replace("up_proj", "w3"): tensor for name, tensor in weights.items()},
        r"layers that it does not have: model.layers.0.mlp.w3",
    ),
    "of another size": (
        lambda weights: {
            name: torch.cat([tensor, tensor]) if "0.mlp.up_proj.lora_B" in name else tensor for name, tensor in weights.items()
        },
        "model.layers.0.mlp.up_proj.lora_B is",
    ),
    "with other weights": (lambda weights: {**weights, "llm.projector.weight": torch.ones(2)}, "belong to none: llm.projector.weight"),
    "not finite": (lambda weights: {name: tensor / 0 for name, tensor in weights.items()}, "NaN or infinity in llm.base_model"),
    "two": (
        lambda weights: {**weights, **{name.replace(".weight", ".b.weight"): one for name, one in weights.items()}},
        "several adapters",
    ),
}


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_an_adapter_that_is_not_the_base_s_is_refused(what: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    make, complaint = BAD_ADAPTERS[what]
    weights = prefixed(get_peft_model_state_dict(adapted(tiny_model_folder)), "llm.")
    torch.save({"state_dict": make(weights), "meta": {"cfg": CONFIG}}, tmp_path / "a.pth")
    with pytest.raises(DataError, match=complaint):
        convert(tmp_path / "a.pth", tmp_path / "adapter", tiny_model_folder)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_files_that_are_none(trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    place = whole.index(b"\x80\x02") + 20  # in the pickle
    damaged = whole[:place] + bytes(40) + whole[place + 40 :]
    files = {
        "torn.pth": (whole[: len(whole) // 2], "no whole file of torch.save"),
        "damaged.pth": (damaged, "no whole file of torch.save"),
        "page.pth": (b"<!DOCTYPE html><html>", "it begins with '<!DOCTYPE html>"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "it begins with 'version https"),
        "empty.pth": (b"", "the file is empty"),
        "noise.pth": (bytes(range(255, 0, -1)), "no whole file of torch.save"),
    }
    for name, (content, complaint) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: .*{complaint}"):
            pytest.fail(f"{name}: {convert(tmp_path / name, tmp_path / 'hf', tiny_model_folder)}")
    assert not (tmp_path / "hf").exists()


def test_arguments_that_name_nothing(trained: Weights, tiny_model_folder: Path, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "a.pth")
    for source, base, complaint in (
        ("missing.pth", tiny_model_folder, "there is no such file or folder"),
        ("a.pth", None, "--base must name the folder"),
        ("a.pth", tmp_path / "none", "none: there is no such folder"),
        ("a.pth", tmp_path, "is not a complete model folder"),
    ):
        with pytest.raises(RecipeError, match=complaint):
            convert(tmp_path / source, tmp_path / "hf", base)
    with pytest.raises(RecipeError, match="exists already"):
        convert(tmp_path / "a.pth", tmp_path, tiny_model_folder)
    with pytest.raises(DataError, match="no checkpoint of DeepSpeed"):
        convert(tmp_path, tmp_path / "hf", tiny_model_folder)
