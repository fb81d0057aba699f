"""Attention kernels for sequences of varying length on a GPU: which one a layer gets, and how each is called.

Every kernel is a function `(query, key, value, places, scale, window) -> out`:
query `[Tq, H, D]`, key and value `[Tk, K, D]` with H a multiple of K, `places` the bounds of the sequences (`documents.Varlen`), out
`[Tq, H, D]`. Causal within each sequence, aligned at the bottom right: the last query sees the last key. `window` is the number of keys
that a query sees at most, its own included; None means all. Gradients flow to query, key and value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch

from xtuner_core.models.documents import Varlen

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Varlen, float, int | None], torch.Tensor]
FA3, FA2, TORCH = "flash-attn 3", "flash-attn 2", "torch varlen"
AMPERE, HOPPER = 8, 9
"""Major compute capability."""
WIDEST = 256
"""Elements of a head that the kernels can take."""


def choose_kernel(
    available: Mapping[str, Kernel],
    use_fa3: bool,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    width: int,
    value_width: int,
    plain: bool,
) -> Kernel | None:
    """The kernel of a layer; None where it must be computed by groups of documents (xtuner_core/models/attention.py).

    capability: the GPU's compute capability; None on a CPU. width, value_width: of a head's keys and values; narrower values are
    padded. plain: no sinks, cap or dropout (no kernel here has a gradient through its log-sum-exp, as sinks would need).

    FlashAttention 3 (arXiv:2407.08608) is for Hopper and only taken if asked for, then FlashAttention 2 (arXiv:2307.08691) as its own
    package and as torch has it; both begin with Ampere. All compute in 16 bits, with heads of a multiple of 8 up to 256 elements.
    """
    if capability is None:
        return None
    fits = dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and value_width <= width <= WIDEST
    names = usable(available, use_fa3, capability) if plain and fits else []
    return available[names[0]] if names else None


def usable(available: Mapping[str, Kernel], use_fa3: bool, capability: tuple[int, int]) -> list[str]:
    """The names of the kernels that this GPU can run, first choice first."""
    order = ([FA3] if use_fa3 and capability[0] == HOPPER else []) + ([FA2, TORCH] if capability[0] >= AMPERE else [])
    return [name for name in order if name in available]


def described(use_fa3: bool, device: torch.device) -> str:
    """For the log: what layers are computed by on this device, if it can do what they ask."""
    of_device = capability(device)
    names = usable(available(), use_fa3, of_device) if of_device else []
    return f"{names[0]}, else documents in groups" if names else "documents in groups"


@lru_cache(1)
def available() -> dict[str, Kernel]:
    """What is installed, by name. A package that cannot be imported counts as not installed."""
    found: dict[str, Kernel] = {}
    for name, call, modules, function in (
        (FA3, _flash, ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash_attn_varlen_func"),
        (FA2, _flash, ("flash_attn",), "flash_attn_varlen_func"),
        (TORCH, _torch, ("torch.nn.attention.varlen",), "varlen_attn"),
    ):
        if (kernel := _first(modules, function)) is not None:
            found[name] = partial(call, kernel)
    return found


def _first(modules: tuple[str, ...], function: str) -> Callable[..., Any] | None:
    for module in modules:
        try:
            kernel = getattr(import_module(module), function)
        except (ImportError, AttributeError):
            continue
        if "window_size" in inspect.signature(kernel).parameters:  # before torch 2.11 its kernel had none, and no scale
            return kernel
    return None


@lru_cache(None)
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


def _left(window: int | None) -> int:
    """Keys to the left of the query that it sees, as the kernels count them; -1 for all."""
    return -1 if window is None else window - 1


def _flash(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: Varlen,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`flash_attn_varlen_func` of flash-attn 2 and 3, which share these names; some versions of 3 also return the log-sum-exp."""
    out = kernel(
        query, key, value,
        cu_seqlens_q=places.query_bounds, cu_seqlens_k=places.key_bounds,
        max_seqlen_q=places.longest_query, max_seqlen_k=places.longest_key,
        softmax_scale=scale, causal=True, window_size=(_left(window), 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def _torch(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: Varlen,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; its backward pass is deterministic if torch is told to be."""
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}
    bounds = (places.query_bounds, places.key_bounds, places.longest_query, places.longest_key)
    return kernel(query, key, value, *bounds, scale=scale, window_size=(_left(window), 0), **grouped)
