"""Attention seam: packed documents, each attending to itself only, without a dense mask.

Legend: T packed tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "xtuner_documents"


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
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    query `[1, H, T, D]`, key and value `[1, K, T, D]`, `cu_seq_lens_q` `[documents + 1]` → `[1, T, H, D]`.

    Raises:
        ValueError: no document bounds were passed (padded input would get no mask at all), or the model needs attention sinks.
    """
    if cu_seq_lens_q is None:
        raise ValueError("document_attention needs cu_seq_lens_q; use attn_implementation='sdpa' for padded input")
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not supported")
    bounds = cu_seq_lens_q.tolist()
    pieces = [
        _one_document(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], dropout, scaling, sliding_window)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _one_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None, window: int | None
) -> torch.Tensor:
    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def register() -> str:
    """Make the function known to transformers; returns its name for `attn_implementation`.

    Nothing is registered in AttentionMaskInterface on purpose: a name without an entry there gets no dense mask.
    """
    AttentionInterface.register(NAME, document_attention)
    return NAME
