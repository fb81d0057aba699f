"""A folder as a GGUF file, and back by transformers' own reading: the same tensors, the same tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.gguf import export_gguf
from xtuner_core.export.gguf_vocabulary import PRE_TOKENIZERS, pre_tokenizer_name
from xtuner_core.models.gguf import import_gguf
from xtuner_core.models.gguf_config import config_of
from xtuner_core.models.preset import create_from_config

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 50000.0},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}  # fmt: skip
TEXTS = ("Hello, world! It's 4711.", "  two  blanks\n\n\ttab", "é 你好 😀", "<|im_start|>user\nhi<|im_end|>\n")


@pytest.fixture(scope="module")
def vocabulary(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 283 tokens of SmolLM2's vocabulary, with their merges and their control tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(smollm2_folder / name, folder / name)
    tokenizer = json.loads((smollm2_folder / "tokenizer.json").read_text())
    kept = {token: number for token, number in tokenizer["model"]["vocab"].items() if number < 283}
    tokenizer["model"]["vocab"] = kept
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def model_of(vocabulary: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with random weights, norms and biases included, of one of MODELS, changed."""

    def make(name: str, **fields: Any) -> Path:
        folder = tmp_path / "hf"
        create_from_config({**SHAPE, **MODELS[name], **fields}, folder, 1, vocabulary)
        torch.manual_seed(2)
        weights = load_file(folder / "model.safetensors")
        save_file({key: torch.randn_like(one) for key, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors as fp32, by transformers' own reading with our config."""
    config = config_of(file, gguf.GGUFReader(file))
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32).state_dict()


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(3, 123)[None]).logits


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


# There and back ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_f32_is_the_same_model(name: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of(name)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    ours, theirs = read(tmp_path / "m.gguf"), weights_of(folder)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "m.gguf"]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_rounds_matrices_once(kind: str, dtype: torch.dtype, model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("llama")
    export_gguf(folder, tmp_path / "m.gguf", kind)
    ours, theirs = read(tmp_path / "m.gguf"), weights_of(folder)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.to(dtype).float() if tensor.ndim > 1 else tensor)


@pytest.mark.parametrize(
    ("kind", "room"),
    [
        ("q8_0", 0.57 / 127),  # half a step, and the rounding of the scale to float16 on 127 steps
        ("q5_1", 0.53 / 31),
        ("q4_1", 0.52 / 15),
        ("q4_0", 1.01 / 8),  # the step next to the largest number's opposite does not exist
    ],
)
def test_quantized_numbers_are_within_half_a_step(kind: str, room: float, model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("qwen2")
    export_gguf(folder, tmp_path / "m.gguf", kind)
    ours, theirs = read(tmp_path / "m.gguf"), weights_of(folder)
    for key, tensor in theirs.items():
        if tensor.ndim == 1:
            assert torch.equal(ours[key], tensor)
            continue
        blocks, error = tensor.reshape(-1, 32), (ours[key] - tensor).reshape(-1, 32).abs()
        span = blocks.amax(1) - blocks.amin(1) if kind.endswith("1") else blocks.abs().amax(1)
        assert bool((error.amax(1) <= room * span).all())


def test_the_same_folder_gives_the_same_bytes(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("llama")
    for place in ("a", "b"):
        export_gguf(folder, tmp_path / place / "m.gguf", "q8_0")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_tokens_and_template_come_back(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("llama")
    export_gguf(folder, tmp_path / "m.gguf", "bf16")
    import_gguf(tmp_path / "m.gguf", tmp_path / "again")
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "again", folder))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token, ours.bos_token, ours.pad_token) == (theirs.eos_token, theirs.bos_token, theirs.pad_token)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}),
        ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {"rope_parameters": {"rope_theta": 50000.0, **YARN}}),
        ("qwen2", {"rope_parameters": {"rope_theta": 50000.0, **YARN, "beta_fast": 8.0, "beta_slow": 2.0}}),
        ("qwen3", {}),
        ("qwen3_moe", {}),
    ],
)
def test_there_and_back_is_the_same_model(name: str, fields: dict[str, Any], model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Scaled positions, biases, and sizes of heads and experts, which transformers' own reading loses."""
    folder = model_of(name, **fields)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    import_gguf(tmp_path / "m.gguf", tmp_path / "again", "float32")
    assert torch.equal(logits(tmp_path / "again"), logits(folder))


def edited(file: Path, without: str = "", **fields: Any) -> Path:
    """A copy of a GGUF file without a tensor, and with other fields or more."""
    reader, copy = gguf.GGUFReader(file), file.with_name("edited.gguf")
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture" and field.name not in fields:
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for key, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "positions scaled by longrope are not known"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 0.5}, "attn_factor = 0.5"),
        ({"llama.rope.dimension_count": 8}, "its heads have 16 numbers, but rope.dimension_count is 8"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"without": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight is missing"),
        ({"llama.feed_forward_length": 64}, r"gate_proj.weight is \[96, 64\] and should be \[64, 64\]"),
        ({"llama.block_count": 1}, "of its numbers have no place in a LlamaForCausalLM"),
    ],
)
def test_what_would_become_another_model_is_refused(
    change: dict[str, Any], complaint: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    export_gguf(model_of("llama"), tmp_path / "m.gguf", "bf16")
    with pytest.raises(DataError, match=complaint):
        import_gguf(edited(tmp_path / "m.gguf", **change), tmp_path / "again")
    assert not (tmp_path / "again").exists()


# What is in the file ----------------------------------------------------------------------------------------------------------------


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_its_fields(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("llama", rope_theta=50000.0, vocab_size=310)
    export_gguf(folder, tmp_path / "m.gguf", "q8_0")
    fields = fields_of(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "llama", "general.file_type": 7, "llama.context_length": 128, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 50000.0, "llama.rope.dimension_count": 16, "llama.vocab_size": 310, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: fields[name] for name in wanted} == wanted
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 310
    assert (tokens[2], types[2]) == ("<|im_end|>", gguf.TokenType.CONTROL)
    assert (tokens[282], types[282]) == (fields["tokenizer.ggml.merges"][-1].replace(" ", ""), gguf.TokenType.NORMAL)
    assert (tokens[309], types[309]) == ("[PAD309]", gguf.TokenType.UNUSED)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "factor": 2.0, "original_context_length": 64},
        ),
    ],
)
def test_scaled_positions(rope: dict[str, Any], wanted: dict[str, Any], model_of: Callable[..., Path], tmp_path: Path) -> None:
    export_gguf(model_of("qwen2", rope_parameters={"rope_theta": 10000.0, **rope}), tmp_path / "m.gguf", "bf16")
    fields = fields_of(tmp_path / "m.gguf")
    assert {name: fields[f"qwen2.rope.scaling.{name}"] for name in wanted} == wanted


def test_llama_3_s_scaling_is_a_tensor(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("llama", rope_parameters={"rope_theta": 10000.0, **LLAMA3})
    export_gguf(folder, tmp_path / "m.gguf", "bf16")
    [factors] = [tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "rope_freqs.weight"]
    slowed = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(factors.data), slowed)
    assert 1.0 in factors.data and 8.0 in factors.data


# Tokenizers -------------------------------------------------------------------------------------------------------------------------


def bpe(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]], "ignore_merges": False, "byte_fallback": False}
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"model": {**model, **changes.pop("model", {})}, "pre_tokenizer": step, "normalizer": None, **changes}


def split(digits: str) -> dict[str, Any]:
    [words] = [key[0][1] for key, name in PRE_TOKENIZERS.items() if name == "qwen2"]
    step = {"type": "Split", "pattern": {"Regex": words.replace(r"\p{N}|", digits + "|")}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}


def test_known_cuts_have_llama_cpp_s_names(smollm2_folder: Path) -> None:
    known = {
        "smollm": json.loads((smollm2_folder / "tokenizer.json").read_text()),
        "gpt-2": bpe(),
        "qwen2": bpe(pre_tokenizer=split(r"\p{N}"), normalizer={"type": "NFC"}),
        "llama-bpe": bpe(pre_tokenizer=split(r"\p{N}{1,3}"), model={"ignore_merges": True}),
    }
    assert {pre_tokenizer_name(tokenizer, smollm2_folder): name for name, tokenizer in known.items()} == {name: name for name in known}


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe(pre_tokenizer=split(r"\p{N}{1,2}")),
        bpe(pre_tokenizer=split(r"\p{N}{1,3}")),  # llama.cpp would keep words that are tokens whole
        bpe(normalizer={"type": "Lowercase"}),
        bpe(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        bpe(pre_tokenizer=None),
        bpe(model={"byte_fallback": True}),
        bpe(model={"type": "Unigram"}),
        bpe(model={"merges": []}),
    ],
)
def test_an_unknown_tokenizer_is_refused(tokenizer: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be written as GGUF"):
        pre_tokenizer_name(tokenizer, tmp_path)


# What cannot be written -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused(model_of: Callable[..., Path], tiny_model_folder: Path, tmp_path: Path) -> None:
    def refused(folder: Path, complaint: str, error: type[Exception] = RecipeError, kind: str = "bf16") -> None:
        with pytest.raises(error, match=complaint):
            export_gguf(folder, tmp_path / "m.gguf", kind)
        assert [file.name for file in tmp_path.iterdir()] in (["hf"], [])

    refused(tmp_path / "none", "none: no model folder")
    refused(tiny_model_folder, "its tokenizer is no byte-level BPE with merges")
    folder = model_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    refused(folder, "rope_type dynamic; known: default, linear, yarn, llama3")
    shutil.rmtree(folder)
    folder = model_of("llama", rope_parameters={"rope_theta": 10000.0, **YARN, "attention_factor": 2.0})
    refused(folder, "no place for the positions' attention_factor = 2.0")
    shutil.rmtree(folder)
    folder = model_of("llama")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 1e6}, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "m.gguf", "f16")  # vectors stay float32
    (tmp_path / "m.gguf").unlink()
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] * 1e6}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "output.weight: holds numbers that are not finite as F16. Write it as bf16 or f32", DataError, "f16")
    (folder / "model.safetensors").write_bytes(b"<html>")
    refused(folder, "not a whole safetensors file", DataError)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "gpt2"}))
    refused(folder, "its architecture is gpt2; known: llama, qwen2")


def test_an_existing_file_is_kept(model_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        export_gguf(model_of("llama"), tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.slow
def test_a_real_model(smollm2_folder: Path, tmp_path: Path) -> None:
    """SmolLM2's first layers and all of its tokenizer, as bf16 and back: every number to the bit, every token.

    The tokenizer's files come back as they were, for they once came from a GGUF file.
    """
    folder = Path(shutil.copytree(smollm2_folder, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    kept = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not re.search(r"layers\.([2-9]|\d\d)\.", name)
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "m.gguf", "bf16")
    import_gguf(tmp_path / "m.gguf", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    import_gguf(tmp_path / "m.gguf", tmp_path / "twice")
    for file in (tmp_path / "again").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), "an import is the same bytes each time"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
