"""A GGUF file becomes a Hugging Face folder once; everything after that only knows the folder.

The weights are stored in bfloat16: llama.cpp's 4-bit blocks carry far less than its 8 bits of mantissa, the models were trained in it,
and the folder is half as large as in float32. Logits equal those of the GGUF file loaded in the same dtype, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFReader

from xtuner_core.checkpoint.hf import make_portable, save_model
from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError
from xtuner_core.models.check import some, without_report
from xtuner_core.models.gguf_config import SLOWED, config_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def import_gguf(gguf_file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Dequantise `gguf_file` into a complete Hugging Face folder (weights, config, generation config, tokenizer, chat template, licence).

    Raises:
        DataError: not a GGUF file, a damaged one, an architecture transformers cannot read, or not just the tensors of its model.
    """
    with _readable(gguf_file), without_report():
        reader = GGUFReader(gguf_file)
        tokenizer = _load_tokenizer(gguf_file, reader)
        model = _load_dequantised(gguf_file, reader, dtype)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = _generation_config(tokenizer)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    if licence := _metadata(reader, "general.license"):
        write_bytes(folder / "README.md", f"---\nlicense: {json.dumps(licence)}\n---\n".encode())


@contextmanager
def _readable(gguf_file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{gguf_file}: cannot be imported as a GGUF model: {error}. Check the file, or download it again.") from None


def _load_dequantised(gguf_file: Path, reader: GGUFReader, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    # dequantize also makes transformers forget the quantizer, with which it refuses to save
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        config=config_of(gguf_file, reader),
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loaded
    _require_all(gguf_file, reader, model, info)
    return model


def _require_all(gguf_file: Path, reader: GGUFReader, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """transformers draws what is missing or does not fit at random, and passes over what its model has no place for."""
    told = [f"{name} is {list(found)} and should be {list(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])]
    told += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    known = {SLOWED, "output.weight"} if model.config.tie_word_embeddings else {SLOWED}
    held = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in known)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if not told and held > taken:
        told = [f"{held - taken} of its numbers have no place in a {type(model).__name__}"]
    if told:
        raise DataError(f"{gguf_file}: cannot be imported: {some(told)}. Take the model's original folder.")


def _load_tokenizer(gguf_file: Path, reader: GGUFReader) -> PreTrainedTokenizerFast:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if _metadata(reader, "tokenizer.ggml.pre") == "smollm":
        # transformers reads every GPT-2 style vocabulary as plain GPT-2; this one was trained with each digit as a token
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return tokenizer


def _metadata(reader: GGUFReader, name: str) -> str | None:
    field = reader.fields.get(name)
    return field.contents() if field else None


def _generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
