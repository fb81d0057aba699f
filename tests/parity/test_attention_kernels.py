"""Document attention by variable-length kernels: what they are given, and on a GPU what they give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_models import LENGTHS, MODELS, TOLERANCE, VOCABULARY, difference, documents, models, packing

from xtuner_core.models import attention
from xtuner_core.models.attention_kernels import FA2, FA3, TORCH, available, choose_kernel
from xtuner_core.models.documents import Varlen, varlen


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
