"""Attention seam: packed documents, each attending to itself only, without a dense mask over the row.

Legend: T packed tokens, N documents of a group, L longest of the group, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from xtuner_core.errors import RecipeError

NAME = "xtuner_documents"
SHORT = 512
"""Up to this length the CPU's own SDPA backward (bf16) is slower than two batched matrix products: 3 times at 256, 7 times at 64 tokens."""
_MISSING = {"s_aux": "attention sinks", "softcap": "capped attention scores"}


@torch.compiler.disable  # document lengths differ from pack to pack; compiled, they would recompile each time
def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    shared_prefix: int = 0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row; the row's first `shared_prefix` tokens begin every document.

    query `[1, H, T, D]`, key and value `[1, K, T, D]`, `cu_seq_lens_q` `[documents + 1]` → `[1, T, H, D]`.
    Documents of similar length are computed together, padded to the longest of them: under a causal mask padding at the end is
    never seen by a real token.

    Raises:
        ValueError: no document bounds were passed (padded input would get no mask at all).
        RecipeError: the model needs attention sinks or capped scores, which are not there.
    """
    if cu_seq_lens_q is None:
        raise ValueError("document_attention needs cu_seq_lens_q; use attn_implementation='sdpa' for padded input")
    if needed := [what for name, what in _MISSING.items() if kwargs.get(name) is not None]:
        raise RecipeError(f"model.base: {type(module).__name__} needs {needed[0]}, which training here lacks; choose another model.")
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
    out = torch.empty(rows[0].shape[0], query.shape[1], value.shape[-1], dtype=query.dtype, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for places, own in _groups(cu_seq_lens_q.tolist(), shared_prefix):
        grouped_query, grouped_key, grouped_value = (row[places].transpose(1, 2) for row in rows)  # [N, heads, L, D]
        result = _causal(grouped_query, grouped_key, grouped_value, scale, dropout, sliding_window).transpose(1, 2)  # [N, L, H, D]
        out = out.index_put((places[own],), result[own])
    return out.unsqueeze(0), None


def _groups(bounds: list[int], shared: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Documents grouped by length, each group within a factor of two.

    For each group the row places of its documents' tokens `[N, L]`, and which of them the document writes `[N, L]`: its own, not the
    padding, and the shared beginning for the row's first document only.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        groups.setdefault((end - start + shared - 1).bit_length(), []).append((start, end))
    return [_places(documents, shared) for documents in groups.values()]


def _places(documents: list[tuple[int, int]], shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.tensor([start for start, _ in documents])[:, None]
    lengths = torch.tensor([end - start + shared for start, end in documents])[:, None]
    step = torch.arange(int(lengths.max()))[None, :]
    places = torch.where(step < shared, step, starts - shared + torch.minimum(step, lengths - 1))
    return places, (step < lengths) & ((step >= shared) | (starts == shared))


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float, window: int | None) -> torch.Tensor:
    """query `[N, H, L, D]`, key and value `[N, K, L, D]` → `[N, H, L, D]`."""
    length = query.shape[2]
    if query.device.type == "cpu" and length <= SHORT:
        return _grouped_matmul(query, key, value, scale, dropout, window)
    mask = None if window is None or length <= window else _allowed(length, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def _grouped_matmul(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float, window: int | None
) -> torch.Tensor:
    """Attention by two batched products; the H/K query heads that share a key head are stacked as rows, so keys are not repeated."""
    n, heads, length, width = query.shape
    shared = key.shape[1]
    query = query.reshape(n * shared, heads // shared * length, width) * scale
    key, value = key.reshape(n * shared, length, width), value.reshape(n * shared, length, value.shape[-1])
    scores = torch.bmm(query, key.transpose(1, 2)).view(n * shared, heads // shared, length, length)
    scores = scores.masked_fill(~_allowed(length, window, query.device), -torch.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return torch.bmm(weights.view(n * shared, -1, length), value).view(n, heads, length, -1)


def _allowed(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[L, L]`: whether the row's token may see the column's."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None else allowed.triu(1 - window)


def register() -> str:
    """Make the function known to transformers; returns its name for `attn_implementation`.

    Nothing is registered in AttentionMaskInterface on purpose: a name without an entry there gets no dense mask.
    """
    AttentionInterface.register(NAME, document_attention)
    return NAME
