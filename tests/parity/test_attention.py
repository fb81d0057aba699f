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
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,  # of one, the router would have no gradient but rounding
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
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
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
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


# Every document by matrix products, some, none; whole, and in blocks.
every_way = pytest.mark.parametrize(("short", "block"), [(512, 512), (16, 512), (0, 512), (512, 16), (0, 16)])


@every_way
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_documents_alone(name: str, short: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    monkeypatch.setattr(attention, "BLOCK", block)
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


@every_way
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_beginning_stands_for_that_of_every_document(name: str, short: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss weights on the documents' own tokens: the same logits there, and the same gradients of every parameter."""
    monkeypatch.setattr(attention, "SHORT", short)
    monkeypatch.setattr(attention, "BLOCK", block)
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


def test_dropout_keeps_the_expected_value() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    sinks = torch.randn(4)
    plain, _ = attention.document_attention(torch.nn.Identity(), *rows, None, s_aux=sinks, cu_seq_lens_q=bounds)
    dropped = [
        attention.document_attention(torch.nn.Identity(), *rows, None, dropout=0.2, s_aux=sinks, cu_seq_lens_q=bounds)[0]
        for _ in range(2000)
    ]
    assert difference(torch.stack(dropped).mean(0), plain) < 0.05
    assert not torch.equal(dropped[0], dropped[1])


def test_the_backward_pass_of_a_block_draws_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is linear in the values, so the product of values and gradient must be the output's sum."""
    monkeypatch.setattr(attention, "BLOCK", 5)
    query, key, value = (torch.randn(1, 2, 23, 8, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 23], dtype=torch.int32)
    out, _ = attention.document_attention(torch.nn.Identity(), query, key, value, None, dropout=0.5, cu_seq_lens_q=bounds)
    out.sum().backward()
    assert value.grad is not None
    assert (value * value.grad).sum().item() == pytest.approx(out.sum().item(), rel=1e-4)


def test_a_long_document_costs_memory_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores never exist for all pairs of tokens, neither in a window nor with sinks."""
    sizes: list[int] = []
    allowed = attention._allowed

    def watched(*arguments: Any) -> torch.Tensor:
        sizes.append((mask := allowed(*arguments)).numel())
        return mask

    monkeypatch.setattr(attention, "_allowed", watched)
    rows = [torch.randn(1, 1, 2000, 4) for _ in range(3)]
    bounds = torch.tensor([0, 2000], dtype=torch.int32)
    for sinks in (None, torch.zeros(1)):
        attention.document_attention(torch.nn.Identity(), *rows, None, s_aux=sinks, sliding_window=100, cu_seq_lens_q=bounds)
    assert len(sizes) == 8 and max(sizes) < 512 * 612


def test_input_without_document_bounds_is_refused() -> None:
    _, packed = models("llama")
    with pytest.raises(ValueError, match="needs cu_seq_lens_q"):
        packed(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(
    ("unknown", "named"), [({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "is_causal=False")]
)
def test_attention_that_would_be_silently_wrong_is_refused(unknown: dict[str, Any], named: str) -> None:
    rows = [torch.randn(1, 1, 4, 8)] * 3
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RecipeError, match=f"Identity needs {named}, which packed training lacks"):
        attention.document_attention(torch.nn.Identity(), *rows, None, cu_seq_lens_q=bounds, **unknown)
    with pytest.raises(RecipeError, match="Identity needs attention_mask"):
        attention.document_attention(torch.nn.Identity(), *rows, torch.zeros(4, 4), cu_seq_lens_q=bounds)


def test_a_window_that_only_a_dense_mask_would_apply_is_refused() -> None:
    config = AutoConfig.for_model("phimoe", **SMALL, sliding_window=9, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    ids = torch.zeros(1, 18, dtype=torch.long)
    model(input_ids=ids, **packing([9, 9]))
    with pytest.raises(RecipeError, match=r"sliding_window \(9\) holds for it, and a document has 10 tokens; set data.max_length to 9"):
        model(input_ids=ids, **packing([10, 8]))
