"""Models with random weights, described by a config in `presets/`: for tests, verification runs and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from xtuner_core.errors import RecipeError

PRESETS = Path(__file__).resolve().parent / "presets"


def preset_names() -> list[str]:
    """The presets that exist; adding one is adding a config file."""
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def preset_file(name: str) -> Path:
    """The config of a preset.

    Raises:
        RecipeError: unknown preset; the message lists the known ones.
    """
    if name not in preset_names():
        raise RecipeError(f"model.base: preset {name!r} is not one of {', '.join(preset_names())}.")
    return PRESETS / f"{name}.json"


def create_from_preset(name: str, folder: Path, seed: int) -> None:
    """Write a complete Hugging Face folder: weights drawn with `seed`, byte tokenizer, ChatML template, generation config.

    Raises:
        RecipeError: unknown preset.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from xtuner_core.checkpoint.hf import make_portable, save_model
    from xtuner_core.data.byte_tokenizer import BYTES, CONTROLS, write_byte_tokenizer
    from xtuner_core.data.templates.chatml import STOP

    config = AutoConfig.for_model(**json.loads(preset_file(name).read_text(encoding="utf-8")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    bos, eos, pad, *_ = range(BYTES, BYTES + len(CONTROLS))
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=[BYTES + CONTROLS.index(STOP), eos], pad_token_id=pad)
    save_model(model, folder)
    write_byte_tokenizer(folder)
    make_portable(folder)
