"""Activations of decoder layers wait for the backward pass in CPU memory; copies run beside the computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.models.layers import decoder_layers

SMALLEST = 2**20
"""Bytes; what is smaller is not worth a transfer."""


def offload_activations(model: PreTrainedModel, train: TrainConfig, device: torch.device) -> None:
    """Move what decoder layers keep for the backward pass to CPU memory meanwhile, if `train` says so; on a CPU it is there already."""
    if train.activation_offload and device.type != "cpu":
        Offload(device).wrap(decoder_layers(model))


@dataclass(slots=True, weakref_slot=True)
class _Copy:
    """One kept tensor: its copy in CPU memory and, from shortly before it is needed again, on the device."""

    layer: _Layer
    on_cpu: torch.Tensor
    back: torch.Tensor | None = None


@dataclass(slots=True)
class _Layer:
    """What one layer's forward pass keeps. `sources` holds the device's tensors until they are copied."""

    previous: _Layer | None
    sources: list[torch.Tensor] = field(default_factory=list)
    copies: list[weakref.ref[_Copy]] = field(default_factory=list)  # weak: the graph owns them, and frees them as it is used up
    left: Any = None  # event: all copies are in CPU memory
    returned: Any = None  # event: all copies are on the device again


class Offload:
    """Copies on a stream of their own.

    A tensor is copied once, however often it is kept. Its place on the device is free when the next layer's forward pass is over, so
    that nobody waits for a copy. In the backward pass, the layer before the one at work is fetched early. Parameters (and FSDP's
    gathered weights) are no activations; they stay. After torchtune's `OffloadActivations` (torchtune/training/_activation_offloading.py).
    """

    def __init__(self, device: torch.device, smallest: int = SMALLEST) -> None:
        self._device = device
        self._smallest = smallest
        self._streams = torch.get_device_module(device)
        self._beside = self._streams.Stream()
        self._last: _Layer | None = None

    def wrap(self, layers: list[torch.nn.Module]) -> None:
        """Take over the layers' forward passes."""
        for number, layer in enumerate(layers):
            layer.forward = self._offloading(layer, layer.forward, first=number == 0)

    def _offloading(self, module: torch.nn.Module, forward: Callable[..., Any], first: bool) -> Callable[..., Any]:
        @wraps(forward)
        def offloading(*arguments: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **named)
            layer = _Layer(None if first else self._last)
            weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
            known: dict[Any, _Copy] = {}
            with saved_tensors_hooks(lambda tensor: self._pack(tensor, layer, weights, known), self._unpack):
                result = forward(*arguments, **named)
            self._finish(layer)
            return result

        return offloading

    def _pack(self, tensor: torch.Tensor, layer: _Layer, weights: set[int], known: dict[Any, _Copy]) -> torch.Tensor | _Copy:
        if tensor.device.type != self._device.type or type(tensor) is not torch.Tensor or tensor.nbytes < self._smallest:
            return tensor
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)  # unique while `sources` holds it
        if key not in known:
            known[key] = self._leave(tensor, layer)
        return known[key]

    def _leave(self, tensor: torch.Tensor, layer: _Layer) -> _Copy:
        """Begin the way to the CPU."""
        pinned = self._device.type != "cpu"
        self._beside.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._beside):
            on_cpu = torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=True)
        copy = _Copy(layer, on_cpu)
        layer.sources.append(tensor.detach())
        layer.copies.append(weakref.ref(copy))
        return copy

    def _finish(self, layer: _Layer) -> None:
        """Let go of the previous layer's tensors: from here on the device may write over them, as soon as they are copied."""
        layer.left = self._beside.record_event()
        if layer.previous is not None:
            self._streams.current_stream().wait_event(layer.previous.left)
            layer.previous.sources.clear()
        self._last = layer

    def _unpack(self, kept: torch.Tensor | _Copy) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        for layer in (kept.layer, kept.layer.previous):
            if layer is not None and layer.returned is None:
                self._fetch(layer)
        self._streams.current_stream().wait_event(kept.layer.returned)
        assert kept.back is not None
        if self._device.type != "cpu":
            kept.back.record_stream(self._streams.current_stream())
        return kept.back

    def _fetch(self, layer: _Layer) -> None:
        """Begin the way back of all that the layer kept."""
        with self._streams.stream(self._beside):
            for reference in layer.copies:
                if (copy := reference()) is not None:
                    copy.back = torch.empty_like(copy.on_cpu, device=self._device).copy_(copy.on_cpu, non_blocking=True)
        layer.returned = self._beside.record_event()
        layer.sources.clear()
