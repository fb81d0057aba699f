"""Document attention against transformers' eager attention on each document alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.errors import RecipeError
from xtuner_core.models import attention

VOCABULARY = 97
LENGTHS = [1, 40, 7, 1, 10, 64, 23, 5]  # one just over the window of 9
TOLERANCE = 1e-5
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # attention far from uniform; at 0.3 the fp32 rounding of eager itself reaches 1e-5 (against fp64)
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,  # a scaling that is not 1 / sqrt(head_dim)
    },
}


def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights with eager attention and with ours."""
    torch.manual_seed(0)
    eager, packed = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SMALL, **MODELS[name]), attn_implementation=implementation, dtype=torch.float32
        )
        for implementation in ("eager", attention.register())
    )
    packed.load_state_dict(eager.state_dict())
    return eager, packed


def packing(lengths: list[int]) -> dict[str, Any]:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"position_ids": positions, "use_cache": False, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **longest}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("short", [512, 16, 0])  # every document by matrix products, some, none
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_documents_alone(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    eager, packed = models(name)
    ids = torch.randint(VOCABULARY, (1, sum(LENGTHS)))
    weight = torch.randn(1, sum(LENGTHS), VOCABULARY)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    alone = torch.cat([eager(input_ids=ids[:, start:end]).logits for start, end in pairwise(bounds)], dim=1)
    together = packed(input_ids=ids, **packing(LENGTHS)).logits
    assert difference(together, alone) <= TOLERANCE
    for logits in (alone, together):
        (logits * weight).sum().backward()
    for (parameter, expected), (_, found) in zip(eager.named_parameters(), packed.named_parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, parameter
        assert difference(found.grad, expected.grad) <= TOLERANCE, parameter


@pytest.mark.parametrize("short", [512, 16, 0])
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_beginning_stands_for_that_of_every_document(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss weights on the documents' own tokens: the same logits there, and the same gradients of every parameter."""
    monkeypatch.setattr(attention, "SHORT", short)
    eager, packed = models(name)
    shared, own = torch.randint(VOCABULARY, (11,)), [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    weights = [torch.randn(length, VOCABULARY) for length in LENGTHS]
    bounds = [11, *(11 + torch.tensor(LENGTHS).cumsum(0)).tolist()]
    positions = torch.cat([torch.arange(11), *(torch.arange(11, 11 + length) for length in LENGTHS)])[None]
    row = packed(
        input_ids=torch.cat([shared, *own])[None],
        position_ids=positions,
        use_cache=False,
        shared_prefix=11,
        cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32),
    ).logits[0]
    alone = [eager(input_ids=torch.cat([shared, tail])[None]).logits[0, 11:] for tail in own]
    assert difference(row[11:], torch.cat(alone)) <= TOLERANCE
    (row[11:] * torch.cat(weights)).sum().backward()
    sum((logits * weight).sum() for logits, weight in zip(alone, weights, strict=True)).backward()
    for (parameter, expected), (_, found) in zip(eager.named_parameters(), packed.named_parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, parameter
        assert difference(found.grad, expected.grad) <= 2 * TOLERANCE, parameter


def test_the_window_matters_at_these_lengths() -> None:
    ids = torch.arange(64)[None]
    _, windowed = models("mistral")
    _, whole = models("llama")
    whole.load_state_dict(windowed.state_dict())
    assert difference(windowed(input_ids=ids, **packing([64])).logits, whole(input_ids=ids, **packing([64])).logits) > 0.01


def test_documents_do_not_see_each_other() -> None:
    _, packed = models("qwen3")
    ids = torch.randint(VOCABULARY, (1, sum(LENGTHS)))
    before = packed(input_ids=ids, **packing(LENGTHS)).logits
    ids[0, 1:41] = (ids[0, 1:41] + 1) % VOCABULARY  # every token of the second document
    changed = (packed(input_ids=ids, **packing(LENGTHS)).logits != before).any(-1)[0]
    assert changed[1:41].all() and not changed[:1].any() and not changed[41:].any()


def test_dropout_keeps_the_expected_value(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    for short in (512, 0):
        monkeypatch.setattr(attention, "SHORT", short)
        plain, _ = attention.document_attention(torch.nn.Identity(), *rows, None, cu_seq_lens_q=bounds)
        dropped = [
            attention.document_attention(torch.nn.Identity(), *rows, None, dropout=0.2, cu_seq_lens_q=bounds)[0] for _ in range(2000)
        ]
        assert difference(torch.stack(dropped).mean(0), plain) < 0.05
        assert not torch.equal(dropped[0], dropped[1])


def test_input_without_document_bounds_is_refused() -> None:
    _, packed = models("llama")
    with pytest.raises(ValueError, match="needs cu_seq_lens_q"):
        packed(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(("model_type", "needed"), [("gpt_oss", "attention sinks"), ("gemma2", "capped attention scores")])
def test_attention_that_would_be_silently_wrong_is_refused(model_type: str, needed: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    with pytest.raises(RecipeError, match=needed):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), **packing([4]))
