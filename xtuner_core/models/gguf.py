"""A GGUF file becomes a Hugging Face folder once; everything after that only knows the folder.

The weights are stored in bfloat16: llama.cpp's 4-bit blocks carry far less than its 8 bits of mantissa, the models were trained in it,
and the folder is half as large as in float32. Logits equal those of the GGUF file loaded in the same dtype, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_core.checkpoint.hf import make_portable, save_model
from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def import_gguf(gguf_file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Dequantise `gguf_file` into a complete Hugging Face folder (weights, config, generation config, tokenizer, chat template, licence).

    Raises:
        DataError: not a GGUF file, a damaged one, or an architecture transformers cannot read.
    """
    with _readable(gguf_file):
        tokenizer = _load_tokenizer(gguf_file)
        model = _load_dequantised(gguf_file, dtype)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = _generation_config(tokenizer)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    if licence := _metadata(gguf_file, "general.license"):
        write_bytes(folder / "README.md", f"---\nlicense: {json.dumps(licence)}\n---\n".encode())


@contextmanager
def _readable(gguf_file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise DataError(f"{gguf_file}: cannot be imported as a GGUF model: {error}. Check the file, or download it again.") from None


def _load_dequantised(gguf_file: Path, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    # dequantize also makes transformers forget the quantizer, with which it refuses to save
    return AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def _load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    splitter = _metadata(gguf_file, "tokenizer.ggml.pre")
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if splitter == "smollm":
        # transformers reads every GPT-2 style vocabulary as plain GPT-2; this one was trained with each digit as a token
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return tokenizer


def _metadata(gguf_file: Path, name: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf_file).fields.get(name)
    return field.contents() if field else None


def _generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
