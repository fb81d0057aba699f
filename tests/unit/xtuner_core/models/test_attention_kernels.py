"""Which kernel a layer gets, and what each is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xtuner_core.models import attention_kernels
from xtuner_core.models.attention_kernels import FA2, FA3, TORCH, available, choose_kernel
from xtuner_core.models.documents import Documents, groups, varlen

CPU = torch.device("cpu")
ALL: dict[str, Any] = {name: name for name in (FA3, FA2, TORCH)}
LAYER: dict[str, Any] = {
    "available": ALL, "use_fa3": False, "capability": (9, 0), "dtype": torch.bfloat16, "width": 128, "value_width": 128, "plain": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "kernel"),
    [
        ({}, FA2),
        ({"use_fa3": True}, FA3),
        ({"use_fa3": True, "capability": (8, 0)}, FA2),
        ({"use_fa3": True, "capability": (10, 0)}, FA2),
        ({"use_fa3": True, "available": {FA2: FA2, TORCH: TORCH}}, FA2),
        ({"available": {FA3: FA3, TORCH: TORCH}}, TORCH),
        ({"available": {TORCH: TORCH}, "dtype": torch.float16}, TORCH),
        ({"width": 256, "value_width": 64}, FA2),
        ({"available": {}}, None),
        ({"capability": None}, None),
        ({"capability": (7, 5)}, None),
        ({"dtype": torch.float32}, None),
        ({"width": 264, "value_width": 128}, None),
        ({"width": 36, "value_width": 36}, None),
        ({"width": 64, "value_width": 128}, None),
        ({"plain": False}, None),
    ],
)
def test_a_layer_gets_the_first_kernel_that_can_do_it(said: dict[str, Any], kernel: str | None) -> None:
    assert choose_kernel(**{**LAYER, **said}) == kernel


def test_the_log_tells_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_kernels.described(True, CPU) == "documents in groups"
    monkeypatch.setattr(attention_kernels, "capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_kernels, "available", lambda: ALL)
    assert attention_kernels.described(True, CPU) == "flash-attn 3, else documents in groups"
    assert attention_kernels.described(False, CPU) == "flash-attn 2, else documents in groups"


def test_torch_has_its_own_kernel() -> None:
    assert TORCH in available()


def test_a_package_that_is_not_there_is_no_kernel() -> None:
    assert attention_kernels._first(("no_such_package", "torch.nn.attention.varlen"), "varlen_attn") is not None
    assert attention_kernels._first(("no_such_package",), "varlen_attn") is None


def test_flash_attention_is_called_causally_with_the_window_counted_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window does not count the query's own key, and -1 is no window."""
    seen: list[dict[str, Any]] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        seen.append(options)
        return query, None

    places, rows = varlen(Documents((3, 5, 9)), CPU), torch.zeros(9, 1, 8)
    assert attention_kernels._flash(kernel, rows, rows, rows, places, 0.5, None) is rows
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attention_kernels._flash(kernel, rows, rows, rows, places, 0.5, 4)
    assert [(one["causal"], one["window_size"], one["deterministic"]) for one in seen] == [
        (True, (-1, 0), False),
        (True, (3, 0), True),
    ]
    assert (seen[0]["max_seqlen_q"], seen[0]["max_seqlen_k"], seen[0]["softmax_scale"]) == (5, 7, 0.5)


def test_sequences_of_a_row_with_a_shared_beginning() -> None:
    places = varlen(Documents((3, 5, 9)), CPU)
    assert places.keys is not None and places.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert (places.query_bounds.tolist(), places.key_bounds.tolist()) == ([0, 5, 9], [0, 5, 12])
    assert (places.longest_query, places.longest_key) == (5, 7)
    assert places.query_bounds.dtype == places.key_bounds.dtype == torch.int32
    assert varlen(Documents((0, 2, 6)), CPU).keys is None


def test_groups_write_every_place_of_the_row_once() -> None:
    for bounds in ((0, 1, 41, 48, 49, 59, 123), (11, 12, 52, 59, 150)):
        found = groups(Documents(bounds), CPU)
        written = torch.cat([group.rows for group in found])
        assert sorted(written.tolist()) == list(range(bounds[-1]))
        assert all(torch.equal(group.places.flatten()[group.own], group.rows) for group in found)
