"""Random models from presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner_core.errors import RecipeError
from xtuner_core.models.preset import create_from_preset, preset_file, preset_names


def test_unknown_preset_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"'qwen9' is not one of .*{preset_names()[0]}"):
        create_from_preset("qwen9", tmp_path, 0)


def test_the_seed_decides_the_bytes_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (7, 7, 8), strict=True):
        folder.mkdir()
        before = torch.random.get_rng_state()
        create_from_preset("qwen3-tiny", folder, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(3)
    a, b, c = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert a == b
    assert [name for name in a if a[name] != c[name]] == ["model.safetensors"]


PUBLISHED = {  # parameters, as their makers' weights have them
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama3-8b": 8_030_261_248,
    "qwen3-moe-30ba3": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
}
SMALL = [name for name in preset_names() if name not in PUBLISHED and name != "qwen3-tiny-151k"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_of_a_published_model_has_its_size(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(preset_file(name.upper()).read_text()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_is_a_complete_folder_that_answers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    create_from_preset(name, tmp_path, 0)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
