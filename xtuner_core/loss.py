"""The loss of a packed row, and the proof that it is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from xtuner_core.data.loader import IGNORE, Batch
from xtuner_core.errors import RecipeError
from xtuner_core.linear_cross_entropy import chunked_cross_entropy, linear_cross_entropy
from xtuner_core.models.documents import Documents

_POWERS = {"sample": -1.0, "square": -0.5}


def weigh(batch: Batch, reduction: str) -> Batch:
    """The batch with the weights of its labels, by `train.loss_reduction`; `batch` on the host.

    token: every label counts 1. sample: a label counts 1 / n in a document of n labels, so every document counts alike. square:
    1 / sqrt(n), between the two. As in XTuner V1 (`len2weight` of xtuner/v1/loss/ce_loss.py). A document that packing cuts into pieces
    counts as so many documents.
    """
    if reduction == "token":
        return batch
    learned = batch.labels[0] != IGNORE
    counts = torch.diff(F.pad(learned.cumsum(0), (1, 0))[batch.boundaries])
    weights = counts.clamp(min=1).double().pow(_POWERS[reduction]).repeat_interleave(torch.diff(batch.boundaries))
    return replace(batch, weights=(F.pad(weights, (batch.shared, 0)) * learned).float().unsqueeze(0))


def packed_loss(model: PreTrainedModel, batch: Batch, chunk: int) -> torch.Tensor:
    """Summed, weighted token cross-entropy of a packed row, in fp32 (0-d).

    A method of the FSDP root (`register_fsdp_forward_method`), so that calling the inner decoder does not bypass the root's hooks.
    Only positions with a label reach the head: in chat data most positions have none.
    """
    batch = batch if batch.places is not None else batch.to(batch.labels.device)
    assert batch.places is not None
    hidden = model.get_decoder()(**_inputs(batch)).last_hidden_state[0, batch.places]  # [learned, hidden]
    labels, weights = batch.labels[0, batch.places], None if batch.weights is None else batch.weights[0, batch.places]
    matrix = _matrix(model, hidden)
    if matrix is None:
        return chunked_cross_entropy(hidden, _logits(model), labels, chunk, weights)
    return linear_cross_entropy(hidden, matrix, labels, chunk, weights)


@torch.no_grad()
def token_losses(model: PreTrainedModel, batch: Batch, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every label, in the order of `batch.places`: its cross-entropy `[learned]` fp32, and whether it was the likeliest token.

    `batch` is on the model's device; logits exist for `chunk` labels at a time.
    """
    assert batch.places is not None
    hidden = model.get_decoder()(**_inputs(batch)).last_hidden_state[0, batch.places]
    labels, logits = batch.labels[0, batch.places], _logits(model)
    losses, hits = [], []
    for piece, target in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        scores = logits(piece)
        losses.append(F.cross_entropy(scores, target, reduction="none"))
        hits.append(scores.argmax(-1) == target)
    return torch.cat(losses), torch.cat(hits)


def _matrix(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor | None:
    """The head's weight, if logits are nothing but its product with the hidden states."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or _scale_and_cap(model) != (1.0, None):
        return None
    return None if torch.is_autocast_enabled(hidden.device.type) else head.weight


def _logits(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The head, and what the model does to its output afterwards: scale it (Cohere, Granite), cap it by tanh (Gemma 2); fp32."""
    head = cast(torch.nn.Module, model.get_output_embeddings())
    scale, cap = _scale_and_cap(model)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = head(hidden).float()
        out = out if scale == 1.0 else out * scale
        return out if cap is None else cap * torch.tanh(out / cap)

    return logits


def _scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    """By the names of the config, which families share; `require_packable` proves that they mean the same here, and that nothing else
    happens to the logits.
    """
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "documents": Documents(tuple(batch.boundaries.tolist())),
    }


def require_packable(model: PreTrainedModel) -> None:
    """Prove on eight tokens that `packed_loss` will be the model's own loss; `model` in evaluation mode.

    Two documents behind a common beginning of two tokens; the second must come out as if the first were not there.

    Raises:
        RecipeError: the model cannot run on packed documents, changes its logits in a way that its config does not say in known words,
            or carries something from one document to the next (recurrent layers, convolutions). Most of it would go wrong silently.
    """
    name = type(model).__name__
    packed = _row([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 2, 3, 4], [2, 5, 8], 2, model.device)
    single = _row([0, 1, 5, 6, 7, 2, 3, 4], [*range(8)], [0, 8], 0, model.device)  # as long, so that rounding is the same
    try:
        with torch.no_grad():
            hidden, alone = (model.get_decoder()(**row).last_hidden_state for row in (packed, single))
            ours, own = _logits(model)(hidden), model(**packed).logits
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # another's code on inputs it was not written for
        raise RecipeError(f"model.base: {name} cannot run on packed documents: {error}. Choose another model.") from error
    if not _same(ours, own):
        raise RecipeError(f"model.base: {name} changes its logits after the head in an unknown way; choose another model.")
    if not _same(hidden[:, 5:8], alone[:, 2:5]):
        raise RecipeError(f"model.base: {name} carries state from one packed document to the next; choose another model.")


def _row(ids: list[int], places: list[int], bounds: list[int], shared: int, device: torch.device) -> dict[str, Any]:
    tokens, positions = torch.tensor([ids]), torch.tensor([places])
    batch = Batch(tokens, tokens, positions, torch.tensor(bounds, dtype=torch.int32), max(places) + 1, (0,), shared, len(ids))
    return _inputs(batch.to(device))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they differ by rounding only, in proportion to the largest value; weights that are not finite are found elsewhere."""
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps) * float(expected.float().nan_to_num().abs().max())
    return torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)
