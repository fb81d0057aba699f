"""Checks of a model on disk, whatever its size: weights are read where the forward pass uses them, and only one module's are held."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.errors import DataError
from xtuner_core.export.tensors import Lazy, Tensors


@torch.inference_mode()
def logits(
    config_dir: Path, tensors: Tensors, probes: Sequence[Sequence[int]], adapter: Path | None = None, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """fp32 logits `[tokens, vocabulary]` of each probe. Memory: the weights of the largest module, one of them being read, activations.

    `tensors` are named as in the model that `config_dir` describes; of tied ones a single name will do. With `adapter`, a peft folder,
    they are the base's. All probes pass together, so that each weight is read once for all of them. They do not meet: attention looks
    back only, and what fills the shorter rows lies behind their ends.

    Raises:
        DataError: a tensor of the model is missing or has another shape.
    """
    model = _outline(config_dir, dtype)
    places = _places(model, tensors)
    if adapter:
        model = _with_adapter(model, adapter)
    held = _read_on_use(places, dtype)
    rows = torch.zeros(len(probes), max(map(len, probes)), dtype=torch.long)
    for row, probe in zip(rows, probes, strict=True):
        row[: len(probe)] = torch.tensor(probe)
    found = model(input_ids=rows, use_cache=False).logits
    held.clear()  # the model itself is a ring of references, which lives until the garbage is collected
    return [found[number, : len(probe)].float() for number, probe in enumerate(probes)]


def _outline(config_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device, which take no memory, and its buffers as it computes them."""
    config = AutoConfig.from_pretrained(config_dir, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _with_adapter(model: PreTrainedModel, adapter: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True).eval()


Places = list[tuple[nn.Module, str, Lazy]]
"""Module, its parameter's name there, and where the numbers come from."""


def _places(model: PreTrainedModel, tensors: Tensors) -> Places:
    """Of every parameter; buffers that are stored with the model are filled at once.

    Parameters become zeros that take no memory: on the meta device peft would put the adapter there too.
    """
    for name, buffer in model.named_buffers():
        if name in tensors:
            buffer.copy_(tensors[name].read())
    found = []
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            lazy = _source(f"{owner}.{name}" if owner else name, model, tensors)
            if lazy is None or lazy.shape != tuple(parameter.shape):
                told = "missing" if lazy is None else f"{list(lazy.shape)} instead of {list(parameter.shape)}"
                raise DataError(f"tensor {owner}.{name} is {told}; these are not the weights of this config.json.")
            setattr(module, name, nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False))
            found.append((module, name, lazy))
    return found


def _source(name: str, model: PreTrainedModel, tensors: Tensors) -> Lazy | None:
    """A tied parameter may be stored under either name."""
    tied = model.all_tied_weights_keys
    others = [tied.get(name), *(target for target, source in tied.items() if source in (name, tied.get(name)))]
    return next((tensors[one] for one in (name, *others) if one in tensors), None)


Held = dict[tuple[int, str], torch.Tensor]
"""Module and parameter's name → its numbers."""


def _read_on_use(places: Places, dtype: torch.dtype) -> Held:
    """Wherever a parameter is used, by its own module or by another, its numbers are read; those of the module used before are dropped.

    Returns what is held at any time.
    """
    held: Held = {}
    for module, name, lazy in places:
        parametrize.register_parametrization(module, name, _Reader((id(module), name), lazy, dtype, held), unsafe=True)
    return held


class _Reader(nn.Module):
    """Stands for a parameter: what torch calls a parametrization, a function of the (empty) parameter that gives its value."""

    def __init__(self, key: tuple[int, str], lazy: Lazy, dtype: torch.dtype, held: Held) -> None:
        super().__init__()
        self._key, self._lazy, self._dtype, self._held = key, lazy, dtype, held

    def forward(self, empty: torch.Tensor) -> torch.Tensor:
        if self._key not in self._held:
            for other in [key for key in self._held if key[0] != self._key[0]]:
                del self._held[other]
            self._held[self._key] = self._lazy.read().to(self._dtype)
        return self._held[self._key]


def noted(tensors: Tensors, digests: dict[str, str]) -> dict[str, Lazy]:
    """The same tensors; each leaves a digest of its type, shape and numbers in `digests` when it was read."""
    return {name: _noted(name, lazy, digests) for name, lazy in tensors.items()}


def _noted(name: str, lazy: Lazy, digests: dict[str, str]) -> Lazy:
    def stream() -> Iterator[torch.Tensor]:
        digest = _begun(lazy)
        for part in lazy.pieces():
            digest.update(_bytes(part))
            yield part
        digests[name] = digest.hexdigest()

    def read() -> torch.Tensor:
        tensor, digest = lazy.read(), _begun(lazy)
        digest.update(_bytes(tensor))
        digests[name] = digest.hexdigest()
        return tensor

    return Lazy(lazy.shape, lazy.dtype, read, stream=stream, never_whole=lazy.never_whole)


def require_noted(tensors: Tensors, digests: Mapping[str, str]) -> None:
    """Refuse tensors that are not those whose digests were noted when they were written, one read after the other.

    Raises:
        DataError: one differs or was not among them; names it.
    """
    for name, lazy in tensors.items():
        digest = _begun(lazy)
        for part in lazy.pieces():
            digest.update(_bytes(part))
        if digest.hexdigest() != digests.get(name):
            raise DataError(f"tensor {name} read back from the exported folder is not what was written. Check the disk, and run it again.")


def _begun(lazy: Lazy) -> hashlib._Hash:
    return hashlib.sha256(f"{lazy.dtype} {list(lazy.shape)}\n".encode())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def largest_difference(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Of two models' logits, relative to the largest logit of the first."""
    pairs = list(zip(one, other, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


def agreement(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], tie: float = 0.0) -> float:
    """Share of positions where the other model's choice is as good: its reference logit is within `tie` × the largest logit of the best."""
    kept = 0
    for exact, rounded in zip(reference, other, strict=True):  # [tokens, vocabulary]
        chosen = exact.gather(-1, rounded.argmax(-1, keepdim=True))[:, 0]
        kept += int((exact.amax(-1) - chosen <= tie * exact.abs().amax(-1)).sum())
    return kept / sum(len(logits) for logits in reference)
