"""Models with random weights, described by a config alone: for tests, verification runs and benchmarks.

A preset is a file in `presets/` with the values its makers published (their configs on the Hugging Face hub).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_core.errors import RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig

PRESETS = Path(__file__).resolve().parent / "presets"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What a folder without weights needs from another to speak as it does."""
Json = dict[str, Any]


def preset_names() -> list[str]:
    """The presets that exist; adding one is adding a config file."""
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def preset_file(name: str) -> Path:
    """The config of a preset, whatever the case of its name (XTuner writes `qwen3-8B`).

    Raises:
        RecipeError: unknown preset; the message lists the known ones.
    """
    if name.lower() not in preset_names():
        raise RecipeError(f"model.base: preset {name!r} is not one of {', '.join(preset_names())}.")
    return PRESETS / f"{name.lower()}.json"


def create_from_preset(name: str, folder: Path, seed: int) -> None:
    """Write a complete Hugging Face folder: weights drawn with `seed`, byte tokenizer, ChatML template, generation config.

    Raises:
        RecipeError: unknown preset.
    """
    create_from_config(json.loads(preset_file(name).read_text(encoding="utf-8")), folder, seed)


def create_from_config(fields: Json, folder: Path, seed: int, tokenizer_dir: Path | None = None, template: str = "chatml") -> None:
    """Write a complete Hugging Face folder of the model that a `config.json`'s fields describe.

    It has the tokenizer of `tokenizer_dir` or, without one, the byte tokenizer with the control tokens of `template`.

    Raises:
        RecipeError: transformers does not know such a model, or there is no such template.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner_core.checkpoint.hf import make_portable, save_model

    try:
        config = AutoConfig.for_model(**fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"the model's config: transformers cannot build such a model: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is None:
        model.generation_config = _speak_bytes(folder, template)
    save_model(model, folder)
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, folder / name)
    make_portable(folder)


def _speak_bytes(folder: Path, template: str) -> GenerationConfig:
    """Write the byte tokenizer; an answer ends with the template's end of turn or with end of text."""
    from transformers import GenerationConfig

    from xtuner_core.data.byte_tokenizer import BYTES, write_byte_tokenizer
    from xtuner_core.data.render import control_tokens, find_template

    chosen, turns = find_template(template), control_tokens(template)
    write_byte_tokenizer(folder, turns, chosen.JINJA)
    bos, eos, pad, first = range(BYTES, BYTES + 4)
    return GenerationConfig(bos_token_id=bos, eos_token_id=[first + turns.index(chosen.STOP), eos], pad_token_id=pad)
