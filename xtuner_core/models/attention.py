"""Attention seam: packed documents, each attending to itself only, without a dense mask over the row.

On a GPU by a kernel for sequences of varying length where one can do what the layer does (attention_kernels.py), else, and on the CPU,
by groups of documents of similar length.

Legend: T packed tokens, N documents of a group, L longest of the group, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from xtuner_core.determinism import switches
from xtuner_core.errors import RecipeError
from xtuner_core.models.attention_kernels import Kernel, available, capability, choose_kernel
from xtuner_core.models.documents import Documents, groups, varlen

NAME = "xtuner_documents"
SHORT = 512
"""Up to this length the CPU's own SDPA backward (bf16) is slower than two batched matrix products: 3 times at 256, 7 times at 64 tokens."""
BLOCK = 512
"""Where plain SDPA will not do: this many queries at a time, with scores of `[BLOCK, L]` or, in a window, `[BLOCK, BLOCK + window]`."""
_KNOWN = {"position_ids"}


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a layer does with its scores: `scale`, cap by tanh (Gemma 2), window, sinks `[H]` (gpt_oss), dropout of the weights."""

    scale: float
    softcap: float | None
    window: int | None
    sinks: torch.Tensor | None
    dropout: float


@torch.compiler.disable  # document lengths differ from pack to pack; compiled, they would recompile each time
def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row; what lies before the first document's own part begins every document.

    query `[1, H, T, D]`, key and value `[1, K, T, D]` → `[1, T, H, D]`. Nothing here waits for the device.

    Raises:
        ValueError: no documents were passed (padded input would get no mask at all).
        RecipeError: the layer's attention is not causal, or has a mask, a bias or perhaps a window of its own.
    """
    if documents is None:
        raise ValueError("document_attention needs to know the documents; use attn_implementation='sdpa' for padded input")
    _require_causal(module, attention_mask, kwargs)
    window = _window(module, kwargs, max(documents.lengths))
    rule = _Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, window, s_aux, dropout)
    kernel = _kernel(query, value, rule)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    out = _by_groups(query, key, value, documents, rule) if kernel is None else _by_kernel(kernel, query, key, value, documents, rule)
    return out.unsqueeze(0), None


def _kernel(query: torch.Tensor, value: torch.Tensor, rule: _Rule) -> Kernel | None:
    plain = rule.softcap is None and rule.sinks is None and rule.dropout == 0
    return choose_kernel(
        available(), switches().use_fa3, capability(query.device), query.dtype, query.shape[-1], value.shape[-1], plain
    )  # fmt: skip


def _by_kernel(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, rule: _Rule
) -> torch.Tensor:
    """query `[T, H, D]`, key and value `[T, K, D]` → `[T, H, D]`; keys of a shared beginning are repeated for every document."""
    places, width = varlen(documents, query.device), value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    if places.keys is not None:
        key, value = _take(key, places.keys), _take(value, places.keys)
    return kernel(query, key, value, places, rule.scale, rule.window)[..., :width]


def _by_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, rule: _Rule) -> torch.Tensor:
    """query `[T, H, D]`, key and value `[T, K, D]` → `[T, H, D]`.

    Documents of similar length are computed together, padded to the longest of them: under a causal mask padding at the end is
    never seen by a real token. Every document draws its own dropout; a shared beginning draws one for all, which leaves the expected
    gradient as it is.
    """
    out = torch.empty(len(query), query.shape[1], value.shape[-1], dtype=query.dtype, device=query.device)
    for group in groups(documents, query.device):
        grouped_query, grouped_key, grouped_value = (
            _take(row, group.places).transpose(1, 2) for row in (query, key, value)
        )  # [N, heads, L, D]
        result = _causal(grouped_query, grouped_key, grouped_value, rule).transpose(1, 2)  # [N, L, H, D]
        out = out.index_put((group.rows,), _take(result.flatten(0, 1), group.own))
    return out


def _take(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """rows `[T, heads, D]` at places `[...]` → `[..., heads, D]`.

    As an embedding, whose backward pass adds up what belongs to one row in order; that of indexing adds fp32 by atomic operations as
    soon as there are two threads, so that the same run would give other bits each time.
    """
    return F.embedding(places, rows.flatten(1)).unflatten(-1, rows.shape[1:])


def _require_causal(module: torch.nn.Module, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    """Refuse what would be left out silently: anything but plain causal attention comes as a mask, a flag or a further tensor."""
    extra = [name for name, value in more.items() if isinstance(value, torch.Tensor) and name not in _KNOWN]
    causal = more.get("is_causal")
    if mask is not None:
        extra.append("attention_mask")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        extra.append("is_causal=False")
    if extra:
        raise RecipeError(
            f"model.base: {type(module).__name__} needs {', '.join(extra)}, which packed training lacks; choose another model."
        )


def _window(module: torch.nn.Module, more: dict[str, Any], longest: int) -> int | None:
    """The layer's sliding window. Some layers (Phi-3.5-MoE) leave theirs to a dense mask, others have none, whatever the config says."""
    unsaid = None if "sliding_window" in more else getattr(getattr(module, "config", None), "sliding_window", None)
    if unsaid and longest > unsaid:
        raise RecipeError(
            f"model.base: {type(module).__name__} leaves open whether the config's sliding_window ({unsaid}) holds for it, and a document "
            f"has {longest} tokens; set data.max_length to {unsaid} or less."
        )
    return more.get("sliding_window")


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """query `[N, H, L, D]`, key and value `[N, K, L, D]` → `[N, H, L, D]`.

    SDPA where it can say what the layer does; it has neither caps nor sinks, and on the CPU its dropout materialises all scores.
    """
    length, cpu = query.shape[2], query.device.type == "cpu"
    windowed = rule.window is not None and rule.window < length
    if rule.softcap is not None or rule.sinks is not None or (cpu and (length <= SHORT or rule.dropout > 0)):
        return _in_blocks(_matmul, query, key, value, rule)
    if windowed:
        return _in_blocks(_sdpa, query, key, value, rule)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=rule.dropout, is_causal=True, scale=rule.scale, enable_gqa=True)


def _in_blocks(
    attend: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule
) -> torch.Tensor:
    """`attend` for `BLOCK` queries at a time and the keys they may see; the scores of a block are recomputed in the backward pass."""
    length = query.shape[2]
    if length <= BLOCK:  # what is there at once anyway may stay
        return attend(query, key, value, rule, 0)
    parts = []
    for first in range(0, length, BLOCK):
        end = min(first + BLOCK, length)
        low = 0 if rule.window is None else max(0, first + 1 - rule.window)
        seen = key[:, :, low:end], value[:, :, low:end]
        parts.append(checkpoint(attend, query[:, :, first:end], *seen, rule, first - low, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule, offset: int) -> torch.Tensor:
    allowed = _allowed(query.shape[2], key.shape[2], offset, rule.window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=rule.dropout, scale=rule.scale, enable_gqa=True)


def _matmul(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule, offset: int) -> torch.Tensor:
    """Attention by two batched products; the H/K query heads that share a key head are stacked as rows, so keys are not repeated.

    query `[N, H, Q, D]`, key and value `[N, K, L, D]` → `[N, H, Q, D]`; query 0 stands at key `offset`.
    """
    (n, heads, rows, width), (shared, length) = query.shape, key.shape[1:3]
    query = query.reshape(n * shared, heads // shared * rows, width) * rule.scale
    key, value = key.reshape(n * shared, length, width), value.reshape(n * shared, length, value.shape[-1])
    scores = torch.bmm(query, key.transpose(1, 2)).view(n * shared, heads // shared, rows, length)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores.float() / rule.softcap)
    scores = scores.masked_fill(~_allowed(rows, length, offset, rule.window, query.device), -torch.inf)
    weights = F.dropout(_softmax(scores, rule.sinks, shared).to(value.dtype), rule.dropout)
    return torch.bmm(weights.reshape(n * shared, -1, length), value).view(n, heads, rows, -1)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None, shared: int) -> torch.Tensor:
    """fp32 softmax over the keys and, if there are sinks `[H]`, one more column that takes its share and gives nothing."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    column = sinks.view(shared, -1, 1, 1).repeat(len(scores) // shared, 1, scores.shape[2], 1)
    return torch.cat([scores, column.to(scores.dtype)], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]


def _allowed(rows: int, length: int, offset: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[rows, L]`: whether the row's token, at key `offset + row`, may see the column's."""
    allowed = torch.ones(rows, length, dtype=torch.bool, device=device).tril(offset)
    return allowed if window is None else allowed.triu(offset + 1 - window)


def register() -> str:
    """Make the function known to transformers; returns its name for `attn_implementation`.

    Nothing is registered in AttentionMaskInterface on purpose: a name without an entry there gets no dense mask.
    """
    AttentionInterface.register(NAME, document_attention)
    return NAME
