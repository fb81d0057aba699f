"""Memory and steps of a run before it starts, from the model's sizes and the settings alone; no torch import.

What a decoder layer keeps for the backward pass is counted as Korthikanti et al. (arXiv:2205.05198, section 4) count it, for the layers
of today (RMSNorm in fp32, grouped keys, gated MLP) and packed documents: without their term in the square of the row's length, since
attention never keeps its scores on a GPU, and on a CPU only inside short documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from xtuner_core.config import TrainConfig
from xtuner_core.models.sizes import Model, Parameters, Widths, count

GIB = 2**30
REDUCED = 4
"""Bytes of a gradient in the buffer in which it is reduced."""
ONE_GROUP = 10**9
"""Trained weights up to which one process takes the model as one group: ten bytes of each are then held at one time."""
WIDTH = {"bf16": 2, "fp32": 4}
NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a 4-bit weight: blocks of 64 with a scale of one byte, whose scales come in blocks of 256 (arXiv:2305.14314)."""
STATE = {"adamw": 8.0, "adamw_8bit": 2.03, "muon": 4.0}
"""Bytes of optimizer state for each trained weight; an optimizer that is not listed counts as AdamW's two moments."""
LOGIT = 8
"""Bytes of a logit, its logarithm of the softmax in fp32, and the gradient made of it (linear_cross_entropy.py)."""
REUSE = {"cpu": 1.3, "cuda": 1.0}
"""Of what a step kept, not all is used again by the next one, whose tensors have other sizes; measured for the CPU's allocator."""
LIBRARIES = {"cpu": 0.45 * GIB, "cuda": 0.6 * GIB}
"""What a process takes with torch and transformers loaded, or a GPU with its context and the kernels' workspaces."""
SHORT = 512
"""Documents up to this length keep their attention scores on a CPU (models/attention.py)."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a step brings: `tokens` of one pack, the learned ones among them, tokens of a usual document, packs a process."""

    tokens: int
    learned: int
    document: int
    packs: int = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at the peak of a step, on the device it computes on."""

    weights: float
    optimizer: float
    gradients: float
    gathered: float
    """Weights in the precision of the computation, as gathered for the layers at work, and their gradients before they are reduced."""
    activations: float
    logits: float
    libraries: float

    @property
    def total(self) -> float:
        """All of it at one time: freed memory of a CPU process stays with it, and on a GPU the parts overlap for most of a step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def breakdown(self) -> str:
        """`activations 0.8, libraries 0.5, …` in GiB, largest first."""
        parts = sorted(((getattr(self, field.name), field.name) for field in fields(self)), reverse=True)
        return ", ".join(f"{name} {size / GIB:.1f}" for size, name in parts if size >= 0.05 * GIB)

    def told(self) -> str:
        """One clause for a person."""
        return f"about {self.total / GIB:.1f} GiB of memory a process ({self.breakdown()})"


def load_of(train: TrainConfig, pack_length: int, max_length: int, packs: Mapping[str, Any]) -> Load:
    """A full pack of documents as long and as much learned as the prepared ones (`data.json`); while there are none all is learned."""
    known = packs.get("tokens", 0)
    return Load(
        tokens=pack_length,
        learned=round(pack_length * packs["learned_tokens"] / known) if known else pack_length,
        document=max(1, known // max(1, packs["accepted"])) if known else max_length,
        packs=train.global_batch_size // train.processes,
    )


def memory(model: Model, train: TrainConfig, load: Load, device: str = "cpu") -> Memory:
    """What one of `train.processes` processes needs on `device` (`cpu` or `cuda`)."""
    parameters = count(model, train)
    parts = train.fsdp.sharding_size or train.processes
    stays = 0.0 if train.fsdp.cpu_offload and device != "cpu" else 1 / parts  # share of weights, gradients, states on the device
    return Memory(
        weights=stays * (WIDTH[train.weights] * parameters.trained + _frozen_bytes(parameters, train)),
        optimizer=stays * STATE.get(train.optimizer, 8.0) * parameters.trained,
        gradients=stays * WIDTH[train.weights] * parameters.trained * (2 if load.packs > 1 and _one_group(parameters, train) else 1),
        gathered=_gathered(parameters, model.widths.layers, train),
        activations=REUSE[device] * load.tokens * _kept(model.widths, train, load, device),
        logits=min(load.learned, train.loss_chunk) * model.widths.vocabulary * LOGIT,
        libraries=LIBRARIES[device],
    )


def _frozen_bytes(parameters: Parameters, train: TrainConfig) -> float:
    packed = parameters.linear if train.method == "qlora" else 0
    return NF4 * packed + WIDTH[train.dtype] * (parameters.frozen - packed)


def _one_group(parameters: Parameters, train: TrainConfig) -> bool:
    """Whether all that is trained is copied and reduced at one time (parallel/shard.py); gradients of a step's packs then meet whole."""
    return train.processes == 1 and not train.fsdp.cpu_offload and parameters.trained <= ONE_GROUP


def _gathered(parameters: Parameters, layers: int, train: TrainConfig) -> float:
    """All that is trained at once, or two layers and, for the whole step, what is outside of them; several processes gather what is frozen
    too.
    """
    width = WIDTH[train.dtype]
    used, reduced = width, width + REDUCED  # a weight; its gradient, and the buffer in which it is reduced
    if _one_group(parameters, train):
        return (used + reduced) * parameters.trained
    trained = parameters.trained - parameters.trained_root
    alone = train.processes == 1 and not train.fsdp.cpu_offload
    frozen, frozen_root = (0, 0) if alone else (parameters.frozen - parameters.frozen_root, parameters.frozen_root)
    at_once = min(2, layers) / layers
    held = at_once if train.fsdp.reshard_after_forward else 1.0
    root = used * (parameters.trained_root + frozen_root) + reduced * parameters.trained_root
    return root + used * held * (trained + frozen) + reduced * at_once * trained


def _kept(widths: Widths, train: TrainConfig, load: Load, device: str) -> float:
    """Bytes a token keeps for the backward pass over all layers."""
    whole = _layer(widths, train) + (_scores(widths, train, load) if device == "cpu" else 0)
    again = int(widths.layers * train.recompute_ratio) if train.recompute != "none" else 0
    least = {"none": whole, "selective": _products(widths, train), "full": WIDTH[train.dtype] * widths.hidden}[train.recompute]
    if train.activation_offload and device != "cpu":
        return 2 * max(least if again else 0, whole)
    return again * least + (widths.layers - again) * whole + (whole if again else 0)


def _layer(widths: Widths, train: TrainConfig) -> float:
    """Bytes a token keeps in one layer.

    Norms keep their input in fp32, the result of the scaling if the scale is trained, and what goes into the matrices. Attention keeps
    query, key, value and result; the MLP the results of its matrices and activation.
    """
    b, trained = WIDTH[train.dtype], train.method == "full"
    norm = 4 + b * (2 if trained else 1)
    heads = (4 + b) * (widths.query + widths.key) if widths.normed_heads else 0
    mlp = (4 if widths.gated else 2) * widths.inner + 2 * widths.copies * widths.hidden
    return 2 * norm * widths.hidden + heads + b * (2 * widths.query + 2 * widths.key) + b * mlp


def _products(widths: Widths, train: TrainConfig) -> float:
    """Bytes a token keeps in one layer if only matrix products, attention and the layer's input are kept."""
    mlp = (2 if widths.gated else 1) * widths.inner
    return WIDTH[train.dtype] * (2 * widths.query + 2 * widths.key + 3 * widths.hidden + mlp)


def _scores(widths: Widths, train: TrainConfig, load: Load) -> float:
    """Attention weights of short documents, in fp32 and for the product in bf16; padding to the longest of a group nearly doubles them."""
    return 2 * widths.heads * load.document * (4 if train.dtype == "fp32" else 4 + 2) if load.document <= SHORT else 0.0


def steps(train: TrainConfig, packs: int | None) -> int | None:
    """Optimizer steps of the run; None if it depends on packs that are not known."""
    if train.total_step is not None or packs is None:
        return train.total_step
    return -(-packs * (train.epochs or 1) // train.global_batch_size)


def operations_per_token(parameters: Parameters) -> float:
    """Of a forward and a backward pass; attention, a few per cent in documents of usual length, is left out (models/flops.py has it)."""
    return 4 * parameters.products + 2 * parameters.products_trained


def advice(train: TrainConfig, device: str) -> Iterable[str]:
    """What can be set to need less, the cheapest first."""
    if train.optimizer == "adamw" and train.method == "full":
        yield "train.optimizer=adamw_8bit"
    if train.weights == "fp32" and train.method == "full" and train.dtype == "bf16":
        yield "train.weights=bf16"
    if train.recompute != "full":
        yield f"train.recompute={'selective' if train.recompute == 'none' else 'full'}"
    yield "a lower data.pack_length or train.loss_chunk"
    if train.method == "full":
        yield "train.method=lora"
    elif train.method == "lora":
        yield "train.method=qlora"
    if device != "cpu" and not train.fsdp.cpu_offload:
        yield "train.fsdp.cpu_offload=true"
