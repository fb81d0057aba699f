"""Cross-entropy on hidden states: logits exist for a chunk of the learned tokens at a time, never whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xtuner_core.data.loader import IGNORE, Batch


def packed_loss(model: torch.nn.Module, batch: Batch, chunk: int) -> torch.Tensor:
    """Summed token cross-entropy of a packed row, in fp32 (0-d).

    A method of the FSDP root (`register_fsdp_forward_method`), so that calling the inner decoder does not bypass the root's hooks.
    Only positions with a label reach the head: in chat data most positions have none.
    """
    hidden = model.model(  # [1, T, hidden]
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.boundaries,
        cu_seq_lens_k=batch.boundaries,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
    ).last_hidden_state
    learned = batch.labels[0] != IGNORE
    return chunked_cross_entropy(hidden[0, learned], model.lm_head, batch.labels[0, learned], chunk)


def chunked_cross_entropy(hidden: torch.Tensor, head: torch.nn.Module, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    """Sum over tokens of -log softmax(head(hidden))[label]; hidden `[N, hidden]`, labels `[N]` → 0-d fp32.

    Each chunk's logits `[chunk, vocabulary]` are recomputed in the backward pass (Chen et al., arXiv:1604.06174).
    """

    def part(piece: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(piece).float(), target, reduction="sum")

    total = hidden.sum() * 0.0 if len(labels) == 0 else torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk):
        total = total + checkpoint(part, hidden[start : start + chunk], labels[start : start + chunk], use_reentrant=False)
    return total.float()
