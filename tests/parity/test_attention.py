"""Document attention against transformers' eager attention on each document alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.errors import RecipeError
from xtuner_core.models import attention
from xtuner_core.models.attention_kernels import FA2, FA3, TORCH, available, choose_kernel
from xtuner_core.models.documents import Documents, Varlen, varlen

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


def models(name: str, known: dict[str, dict[str, Any]] = MODELS) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights with eager attention and with ours."""
    torch.manual_seed(0)
    eager, packed = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**SMALL, **known[name]}), attn_implementation=implementation, dtype=torch.float32
        )
        for implementation in ("eager", attention.register())
    )
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    packed.load_state_dict(eager.state_dict())
    return eager, packed


def documents(lengths: list[int], shared: int = 0) -> Documents:
    return Documents(tuple(accumulate(lengths, initial=shared)))


def packing(lengths: list[int]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"position_ids": positions, "use_cache": False, "documents": documents(lengths)}


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


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: Varlen, scale: float, window: int | None
) -> torch.Tensor:
    """What attention_kernels.py says of a kernel, written down plainly: one sequence after the other, all scores at once."""
    key, value = (rows.repeat_interleave(query.shape[1] // rows.shape[1], dim=1) for rows in (key, value))
    out = []
    for (first, end), (low, high) in zip(pairwise(places.query_bounds.tolist()), pairwise(places.key_bounds.tolist()), strict=True):
        assert end - first <= places.longest_query and high - low <= places.longest_key
        scores = torch.einsum("qhd,khd->hqk", query[first:end], key[low:high]) * scale
        behind = (torch.arange(end - first) + (high - low) - (end - first))[:, None] - torch.arange(high - low)  # last query at last key
        seen = (behind >= 0) & (behind < (high - low if window is None else window))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, value[low:high]))
    return torch.cat(out)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Varlen]:
    """The path of a GPU, with the plain kernel; what it was called with."""
    calls: list[Varlen] = []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: Varlen, *rest: Any) -> torch.Tensor:
        calls.append(places)
        return reference(query, key, value, places, *rest)

    def choose(available: Any, fa3: bool, capability: Any, dtype: torch.dtype, *layer: Any) -> Any:
        return choose_kernel({TORCH: watched}, fa3, (9, 0), torch.bfloat16, *layer)

    monkeypatch.setattr(attention, "choose_kernel", choose)
    return calls


BY_KERNEL = {
    **{name: MODELS[name] for name in ("llama", "mistral", "gemma3", "gpt_oss")},
    "deepseek_v3": {
        "model_type": "deepseek_v3", "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("name", BY_KERNEL)
def test_a_kernel_gets_what_makes_the_row_equal_its_documents_alone(name: str, shared: int, kernel_calls: list[Varlen]) -> None:
    eager, packed = models(name, BY_KERNEL)
    beginning, own = torch.randint(VOCABULARY, (shared,)), [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    weights = [torch.randn(length, VOCABULARY) for length in LENGTHS]
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + length) for length in LENGTHS)])[None]
    row = packed(
        input_ids=torch.cat([beginning, *own])[None], position_ids=positions, use_cache=False, documents=documents(LENGTHS, shared)
    ).logits[0, shared:]
    alone = torch.cat([eager(input_ids=torch.cat([beginning, tail])[None]).logits[0, shared:] for tail in own])
    assert len(kernel_calls) == (0 if name == "gpt_oss" else 2)  # sinks have no kernel
    assert difference(row, alone) <= TOLERANCE
    for logits in (row, alone):
        (logits * torch.cat(weights)).sum().backward()
    for (parameter, expected), (_, found) in zip(eager.named_parameters(), packed.named_parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, parameter
        assert difference(found.grad, expected.grad) <= 2 * TOLERANCE, parameter


def test_all_layers_of_a_batch_share_its_index_tensors(kernel_calls: list[Varlen]) -> None:
    _, packed = models("llama")
    ids = torch.randint(VOCABULARY, (1, sum(LENGTHS)))
    for _ in range(2):
        packed(input_ids=ids, **packing(LENGTHS))
    assert len(kernel_calls) == 4 and all(places is kernel_calls[0] for places in kernel_calls)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_activation_checkpointing_changes_no_bit(by_kernel: bool, request: pytest.FixtureRequest) -> None:
    calls: list[Varlen] = request.getfixturevalue("kernel_calls") if by_kernel else []
    _, packed = models("llama")
    ids, found = torch.randint(VOCABULARY, (1, sum(LENGTHS))), []
    for checkpointing in (False, True):
        if checkpointing:
            packed.gradient_checkpointing_enable()
        packed.train()(input_ids=ids, **packing(LENGTHS)).logits.square().sum().backward()
        found.append([parameter.grad for parameter in packed.parameters()])
        packed.zero_grad(set_to_none=True)
    assert len(calls) == (2 + 4 if by_kernel else 0)  # the second time forward, and again in the backward pass
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_compiled_layer_is_not_compiled_again_for_other_documents() -> None:
    _, packed = models("llama")
    ids = torch.randint(VOCABULARY, (1, 60))
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = packed(input_ids=ids, **packing([20, 30, 10])).logits
    torch.compiler.reset()
    for layer in packed.model.layers:
        layer.compile(backend=count)
    compiled = packed(input_ids=ids, **packing([20, 30, 10])).logits
    before = len(graphs)
    assert before > 0 and difference(compiled, plain) <= TOLERANCE
    for lengths in ([60], [1, 59], [10] * 6, [25, 35]):
        packed(input_ids=ids, **packing(lengths))
    assert len(graphs) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("shared", [0, 37])
@pytest.mark.parametrize("name", [FA3, FA2, TORCH])
def test_the_real_kernels_do_what_the_plain_one_does(name: str, shared: int, window: int | None) -> None:
    """Output and gradients in bf16 against the plain kernel in fp32 on the same numbers."""
    if name not in available() or (name == FA3 and torch.cuda.get_device_capability()[0] != 9):
        pytest.skip(f"{name} is not installed, or not for this GPU")
    device, lengths = torch.device("cuda"), [1, 300, 77, 512, 40]
    places = varlen(documents(lengths, shared), device)
    total = shared + sum(lengths)
    torch.manual_seed(0)
    rows = [torch.randn(total, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    slope = torch.randn(total, 8, 64, device=device)
    found, expected = [], []
    for kernel, dtype, results in ((available()[name], torch.bfloat16, found), (reference_on(device), torch.float32, expected)):
        leaves = [row.to(dtype).requires_grad_() for row in rows]
        key, value = (leaf if places.keys is None else leaf.index_select(0, places.keys) for leaf in leaves[1:])
        out = kernel(leaves[0], key, value, places, 0.125, window)
        out.backward(slope.to(dtype))
        results += [out, *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, expected, strict=True):
        assert difference(one.float(), other) <= 2e-2


def reference_on(device: torch.device) -> Any:
    """The plain kernel makes its masks on the default device."""

    def kernel(*arguments: Any) -> torch.Tensor:
        with device:
            return reference(*arguments)

    return kernel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shared", [0, 11])
def test_a_packed_row_on_a_gpu_equals_its_documents_alone(shared: int) -> None:
    """A whole model in bf16 by the kernel that the rule chooses; deviations are those of bf16."""
    eager, packed = (model.to("cuda", torch.bfloat16) for model in models("llama"))  # pyright: ignore[reportArgumentType]
    beginning, own = torch.randint(VOCABULARY, (shared,)), [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + length) for length in LENGTHS)])[None]
    row = packed(
        input_ids=torch.cat([beginning, *own])[None].cuda(), position_ids=positions.cuda(), use_cache=False,
        documents=documents(LENGTHS, shared),
    ).logits[0, shared:]  # fmt: skip
    alone = torch.cat([eager(input_ids=torch.cat([beginning, tail])[None].cuda()).logits[0, shared:] for tail in own])
    assert difference(row.float(), alone.float()) <= 5e-2
    row.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in packed.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu_never_waits_for_it() -> None:
    _, packed = models("llama")
    packed.to("cuda", torch.bfloat16)  # pyright: ignore[reportArgumentType]
    ids, packed_as = torch.randint(VOCABULARY, (1, sum(LENGTHS))).cuda(), packing(LENGTHS)
    packed_as["position_ids"] = packed_as["position_ids"].cuda()
    packed(input_ids=ids, **packed_as)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed(input_ids=ids, **packed_as).logits.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
