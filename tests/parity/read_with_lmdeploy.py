"""Run by the LMDeploy environment's python: `REQUEST.json FOLDER...`; prints as JSON what LMDeploy makes of each, but for weights."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any

from lmdeploy.archs import get_model_arch
from lmdeploy.messages import GenerationConfig
from lmdeploy.model import get_chat_template
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.models.module_map import MODULE_MAP
from lmdeploy.tokenizer import Tokenizer


def read(folder: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    architecture, config = get_model_arch(folder)
    model = ModelConfig.from_pretrained(folder, device_type="cpu")
    tokenizer = Tokenizer(folder)
    template = get_chat_template(folder)
    with open(f"{folder}/generation_config.json", encoding="utf-8") as file:
        generation = json.load(file)
    stops = GenerationConfig()
    stops.update_from_hf_gen_cfg(generation, tokenizer.eos_token_id)
    return {
        "known": architecture in MODULE_MAP,
        "template": type(template).__name__,
        "chat": tokenizer.encode(template.messages2prompt(messages), add_bos=False),
        "stops": sorted(stops.stop_token_ids),
        "dtype": str(model.dtype),
        "tied": model.tie_word_embeddings,
        "sizes": [model.hidden_size, model.num_layers, model.num_attention_heads, model.num_key_value_heads, model.head_dim],
        "vocabulary": model.vocab_size,
        "rope": getattr(model.hf_config, "rope_parameters", None) or getattr(config, "rope_parameters", None),
    }


def main(request_file: str, *folders: str) -> None:
    with open(request_file, encoding="utf-8") as handle:
        messages = json.load(handle)["messages"]
    print(json.dumps([read(folder, messages) for folder in folders]))


if __name__ == "__main__":
    main(*sys.argv[1:])
