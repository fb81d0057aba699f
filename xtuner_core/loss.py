"""Cross-entropy on hidden states: logits exist for a chunk of the learned tokens at a time, never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xtuner_core.data.loader import IGNORE, Batch
from xtuner_core.errors import RecipeError


def packed_loss(model: PreTrainedModel, batch: Batch, chunk: int) -> torch.Tensor:
    """Summed token cross-entropy of a packed row, in fp32 (0-d).

    A method of the FSDP root (`register_fsdp_forward_method`), so that calling the inner decoder does not bypass the root's hooks.
    Only positions with a label reach the head: in chat data most positions have none.
    """
    hidden = model.get_decoder()(**_inputs(batch)).last_hidden_state  # [1, T, hidden]
    learned = batch.labels[0] != IGNORE
    return chunked_cross_entropy(hidden[0, learned], cast(torch.nn.Module, model.get_output_embeddings()), batch.labels[0, learned], chunk)


def _inputs(batch: Batch) -> dict[str, Any]:
    bounds = {"cu_seq_lens_q": batch.boundaries, "cu_seq_lens_k": batch.boundaries}
    lengths = {"max_length_q": batch.longest, "max_length_k": batch.longest}
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "shared_prefix": batch.shared,
        **bounds,
        **lengths,
    }


def require_plain_head(model: PreTrainedModel) -> None:
    """Prove on four tokens that the model's logits are its head applied to its decoder's output; `model` in evaluation mode.

    Raises:
        RecipeError: it scales or caps its logits afterwards (Granite, Cohere, Gemma 2), which `packed_loss` would silently leave out.
    """
    ids = torch.arange(4)[None]
    inputs = _inputs(Batch(ids, ids, ids, torch.tensor([0, 4], dtype=torch.int32), 4, (0,), 0, 4).to(model.device))
    head = cast(torch.nn.Module, model.get_output_embeddings())
    with torch.no_grad():
        ours = head(model.get_decoder()(**inputs).last_hidden_state)
        own = model(**inputs).logits
    if not torch.allclose(ours.float(), own.float(), rtol=1e-3, atol=0, equal_nan=True):
        raise RecipeError(f"model.base: {type(model).__name__} changes its logits after the head; choose another model.")


def chunked_cross_entropy(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Sum over tokens of -log softmax(head(hidden))[label]; hidden `[N, hidden]`, labels `[N]` → 0-d fp32.

    Each chunk's logits `[chunk, vocabulary]` are recomputed in the backward pass (Chen et al., arXiv:1604.06174).
    """

    def part(piece: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(piece).float(), target, reduction="sum")

    if 0 < len(labels) <= chunk:
        return part(hidden, labels)  # the only chunk: its logits may stay until the backward pass, which follows at once
    total = hidden.sum() * 0.0 if len(labels) == 0 else torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk):
        total = total + checkpoint(part, hidden[start : start + chunk], labels[start : start + chunk], use_reentrant=False)
    return total.float()
