"""Freezing by pattern: what trains, in which precision, and what the finished run holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from xtuner_core import trainer
from xtuner_core.adapters.full import prepare
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models.load import load_model
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest


def frozen(folder: Path, *patterns: str, dtype: str = "bf16") -> dict[str, torch.dtype]:
    """Name → precision of every parameter that the patterns freeze."""
    train = TrainConfig.model_validate({"freeze": patterns, "dtype": dtype})
    model = load_model(folder, train)
    prepare(model, train, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def test_names_and_patterns(tiny_model_folder: Path) -> None:
    assert frozen(tiny_model_folder) == {}
    assert frozen(tiny_model_folder, "model.norm.weight", dtype="fp32") == {"model.norm.weight": torch.float32}
    first = frozen(tiny_model_folder, "model.layers.0.*", "*.layers.[01].mlp.*")
    assert set(first.values()) == {torch.bfloat16}, "what is not trained needs no fp32 master"
    assert {name.split(".mlp.")[0] for name in first if ".layers.1." in name} == {"model.layers.1"}
    assert all(name in first for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"))


def test_a_tied_weight_goes_by_either_name(tiny_model_folder: Path) -> None:
    by_head, by_embedding = (frozen(tiny_model_folder, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert by_head == by_embedding and set(by_head) == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("patterns", [("layers.0",), ("model.norm.weight", "model.layer.*")])
def test_a_pattern_that_matches_nothing_lists_what_exists(tiny_model_folder: Path, patterns: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as told:
        frozen(tiny_model_folder, *patterns)
    assert str(told.value).startswith(
        f"train.freeze: '{patterns[-1]}' matches no parameter. The parameters are: model.embed_tokens.weight,"
    )
    assert str(told.value).count("model.layers.*.self_attn.q_proj.weight") == 1


def test_something_must_be_left_to_train(tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.freeze: model\.\*, lm_head\.\* leaves nothing to train"):
        frozen(tiny_model_folder, "model.*", "lm_head.*")


def test_freeze_is_a_word_several_or_a_list_and_for_method_full() -> None:
    for given, meant in (("a.*", ("a.*",)), ("a, b.*", ("a", "b.*")), (["a"], ("a",))):
        assert TrainConfig.model_validate({"freeze": given}).freeze == meant
    for wrong in ({"freeze": ["a"], "method": "lora"}, {"freeze": "a,"}):
        with pytest.raises(ValidationError, match=r"freeze is for method full|at least 1 character"):
            TrainConfig.model_validate(wrong)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_trains_the_rest_and_nothing_else(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    config = sft_config(freeze=["model.embed_tokens.*", "model.layers.0.*"], dtype=dtype)
    built: list[torch.nn.Module] = []
    build = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *arguments: (result := build(*arguments), built.append(result[0]))[0])
    trainer.train(config, world, stop)
    before, final = load_file(config.model_dir / "model.safetensors"), load_whole(config.work_dir / "final")
    assert final and not any(name.startswith(("model.embed_tokens.", "model.layers.0.", "lm_head.")) for name in final)
    assert all((final[name] != before[name].float()).any() for name in final if final[name].ndim > 1)
    for name, parameter in built[0].named_parameters():
        if name not in final:
            assert torch.equal(parameter.float(), before[name].float()), name
