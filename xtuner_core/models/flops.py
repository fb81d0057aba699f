"""What a training step costs by the model's definition, and the share of the device's best that it reached (MFU).

causal-MFU: a token costs 6 operations for each weight it is multiplied with (forward 2, gradient of the input 2, of the weight 2; a
frozen weight has no gradient of its own, so 4), and attention 6 · heads · head width for each earlier token of its document. Documents
count whole and as they are: neither padding nor what is computed twice is work, and what a shared beginning saves is.
Others charge attention over the whole row, 12 · layers · width · length (Chowdhery et al., arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from xtuner_core.config import TrainConfig

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second by a word of the device's name, the more special word first (the makers' data sheets)."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What decides the operations of a step.

    matmul: weights that a token is multiplied with: all matrices and the head, without the embedding; of experts the active share.
    learned: those of them that get a gradient.
    attention: heads · head width of each layer, and its window (None: all earlier tokens).
    """

    matmul: float
    learned: float
    attention: tuple[tuple[float, int | None], ...]

    def operations(self, lengths: Sequence[int]) -> float:
        """Operations of a forward and a backward pass over documents of these lengths."""
        tokens = sum(lengths)
        pairs = {window: sum(_pairs(length, window) for length in lengths) for window in {window for _, window in self.attention}}
        return (4 * self.matmul + 2 * self.learned) * tokens + 6 * sum(width * pairs[window] for width, window in self.attention)


def _pairs(length: int, window: int | None) -> int:
    """Twice the pairs of a token and one it may see, up to rounding: length² under a causal mask, less what a window hides."""
    return length**2 if window is None or window >= length else length**2 - (length - window) ** 2


def costs_of(model_dir: Path, train: TrainConfig) -> Costs:
    """The costs of the model whose config is in the folder; nothing is read but that file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    sizes = matmul_sizes(model, _active_share(text))
    frozen = train.freeze if train.method == "full" else ("*",)
    learned = sum(size for name, size in sizes.items() if not any(fnmatchcase(name, pattern) for pattern in frozen))
    return Costs(sum(sizes.values()), learned, _attention(text))


def matmul_sizes(model: torch.nn.Module, active_share: float) -> dict[str, float]:
    """Weights by name that a token is multiplied with; a stack of experts `[experts, …]` counts by its active share.

    An embedding is looked up, not multiplied with, unless it is the head as well.
    """
    head = model.get_output_embeddings().weight  # pyright: ignore[reportCallIssue]
    skipped = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} - {id(head)}
    return {
        name: weight.numel() * (active_share if weight.dim() == 3 else 1.0)
        for name, weight in model.named_parameters()
        if weight.dim() >= 2 and id(weight) not in skipped and "bias" not in name.rsplit(".", 1)[-1]
    }


def _active_share(config: Any) -> float:
    experts = next((getattr(config, name) for name in ("num_experts", "n_routed_experts", "num_local_experts") if _has(config, name)), None)
    return config.num_experts_per_tok / experts if experts else 1.0


def _attention(config: Any) -> tuple[tuple[float, int | None], ...]:
    """Width and window of each layer. Keys and values may differ in width (latent attention): the mean of both counts."""
    key = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if _has(config, "qk_nope_head_dim"):
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
    width = (key + (getattr(config, "v_head_dim", None) or key)) / 2
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple((config.num_attention_heads * width, window if kind == "sliding_attention" else None) for kind in kinds)


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def peak_of(device: torch.device, train: TrainConfig) -> float | None:
    """Operations a second of one device at its best: what the configuration says, else of a known GPU; None if nobody knows."""
    if train.peak_flops is not None or device.type != "cuda":
        return train.peak_flops
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """The same by a device's name."""
    return next((peak for word, peak in PEAKS.items() if word in name), None)
