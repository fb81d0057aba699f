"""Document attention against transformers' eager attention on each document alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_models import LENGTHS, MODELS, SMALL, TOLERANCE, VOCABULARY, difference, documents, models, packing
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_core.errors import RecipeError
from xtuner_core.models import attention
from xtuner_core.models.documents import Documents

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
    positions = torch.cat([torch.arange(11), *(torch.arange(11, 11 + length) for length in LENGTHS)])[None]
    row = packed(
        input_ids=torch.cat([shared, *own])[None],
        position_ids=positions,
        use_cache=False,
        documents=documents(LENGTHS, 11),
    ).logits[0]
    alone = [eager(input_ids=torch.cat([shared, tail])[None]).logits[0, 11:] for tail in own]
    assert difference(row[11:], torch.cat(alone)) <= TOLERANCE
    (row[11:] * torch.cat(weights)).sum().backward()
    sum((logits * weight).sum() for logits, weight in zip(alone, weights, strict=True)).backward()
    for (parameter, expected), (_, found) in zip(eager.named_parameters(), packed.named_parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, parameter
        assert difference(found.grad, expected.grad) <= 2 * TOLERANCE, parameter


def test_gradients_are_the_same_bits_each_time_on_two_threads() -> None:
    """Those of a shared beginning are sums over documents; atomic additions would add in another order each time."""
    torch.manual_seed(0)
    rows = [torch.randn(1, heads, 500, 64) for heads in (9, 3, 3)]
    known, threads = documents([50] * 8, 100), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [gradients_of(rows, known) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


def gradients_of(rows: list[torch.Tensor], known: Documents) -> list[torch.Tensor]:
    leaves = [row.clone().requires_grad_() for row in rows]
    query, key, value = leaves
    out, _ = attention.document_attention(torch.nn.Identity(), query, key, value, None, documents=known)
    return list(torch.autograd.grad(out.square().sum(), leaves))


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
    sinks = torch.randn(4)
    plain, _ = attention.document_attention(torch.nn.Identity(), *rows, None, s_aux=sinks, documents=documents([12]))
    dropped = [
        attention.document_attention(torch.nn.Identity(), *rows, None, dropout=0.2, s_aux=sinks, documents=documents([12]))[0]
        for _ in range(2000)
    ]
    assert difference(torch.stack(dropped).mean(0), plain) < 0.05
    assert not torch.equal(dropped[0], dropped[1])


def test_the_backward_pass_of_a_block_draws_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is linear in the values, so the product of values and gradient must be the output's sum."""
    monkeypatch.setattr(attention, "BLOCK", 5)
    query, key, value = (torch.randn(1, 2, 23, 8, requires_grad=True) for _ in range(3))
    out, _ = attention.document_attention(torch.nn.Identity(), query, key, value, None, dropout=0.5, documents=documents([23]))
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
    for sinks in (None, torch.zeros(1)):
        attention.document_attention(torch.nn.Identity(), *rows, None, s_aux=sinks, sliding_window=100, documents=documents([2000]))
    assert len(sizes) == 8 and max(sizes) < 512 * 612


def test_input_without_document_bounds_is_refused() -> None:
    _, packed = models("llama")
    with pytest.raises(ValueError, match="needs to know the documents"):
        packed(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(
    ("unknown", "named"), [({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "is_causal=False")]
)
def test_attention_that_would_be_silently_wrong_is_refused(unknown: dict[str, Any], named: str) -> None:
    rows = [torch.randn(1, 1, 4, 8)] * 3
    with pytest.raises(RecipeError, match=f"Identity needs {named}, which packed training lacks"):
        attention.document_attention(torch.nn.Identity(), *rows, None, documents=documents([4]), **unknown)
    with pytest.raises(RecipeError, match="Identity needs attention_mask"):
        attention.document_attention(torch.nn.Identity(), *rows, torch.zeros(4, 4), documents=documents([4]))


def test_a_window_that_only_a_dense_mask_would_apply_is_refused() -> None:
    config = AutoConfig.for_model("phimoe", **SMALL, sliding_window=9, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    ids = torch.zeros(1, 18, dtype=torch.long)
    model(input_ids=ids, **packing([9, 9]))
    with pytest.raises(RecipeError, match=r"sliding_window \(9\) holds for it, and a document has 10 tokens; set data.max_length to 9"):
        model(input_ids=ids, **packing([10, 8]))
