"""What a step and a measurement of the validation loss say: a line for people in the seeds' format, for programs JSON and named numbers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import torch

GIB = 2**30
MOST_LOSS = 700.0
"""exp of more is no float."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step did on this rank. Times in seconds, memory in GiB, `tgs` tokens per second and device.

    consumed_tokens: of all ranks since step 1, taking every rank's for this one's.
    efficient_attn_ratio: Σ length² of the documents / Σ (tokens of a pack)²: the share of a row's attention that packing leaves.
    mfu: share of the device's best that the step reached (models/flops.py); None if its best is not known.
    """

    step: int
    total_step: int
    data_time: float
    lr: float
    time: float
    text_tokens: int
    total_loss: float
    reduced_llm_loss: float
    max_memory: float
    reserved_memory: float
    grad_norm: float
    tgs: float
    e2e_tgs: float
    eta: float
    pack_efficiency: float
    learned_tokens: int
    consumed_tokens: int
    efficient_attn_ratio: float
    mfu: float | None

    def line(self) -> str:
        """The log line, field for field as XTuner V1 prints it."""
        return (
            f"Step {self.step}/{self.total_step} data_time: {self.data_time:.4f} lr: {self.lr:.6f} time: {self.time:.4f} "
            f"text_tokens: {self.text_tokens:.1f} total_loss: {self.total_loss:.3f}, reduced_llm_loss: {self.reduced_llm_loss:.3f} "
            f"max_memory: {self.max_memory:.2f} GB reserved_memory: {self.reserved_memory:.2f} GB grad_norm: {self.grad_norm:.3f} "
            f"tgs: {self.tgs:.1f} e2e_tgs: {self.e2e_tgs:.1f}"
        )

    def as_row(self) -> dict[str, Any]:
        """One row of `metrics.jsonl`."""
        return asdict(self)

    def tagged(self) -> dict[str, float]:
        """The numbers by XTuner V1's names for TensorBoard; one that is not known or not finite is left out."""
        runtime = ("text_tokens", "learned_tokens", "tgs", "efficient_attn_ratio", "pack_efficiency", "mfu")
        values = {
            "lr": self.lr, "grad_norm": self.grad_norm, "loss/total_loss": self.total_loss, "loss/reduced_llm_loss": self.reduced_llm_loss,
            "time/data_time": self.data_time, "time/step_time": self.time, "time/eta_seconds": self.eta,
            "memory/max_memory_GB": self.max_memory, "memory/reserved_memory_GB": self.reserved_memory,
            "runtime_info/approximate_total_consumed_tokens": self.consumed_tokens, "runtime_info/exp_tgs": self.e2e_tgs,
            **{f"runtime_info/{name}": getattr(self, name) for name in runtime},
        }  # fmt: skip
        return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class ValidationMetrics:
    """The mean loss per learned token of the validation split after a step; `time` in seconds."""

    step: int
    validation_loss: float
    learned_tokens: int
    time: float

    @property
    def perplexity(self) -> float:
        """exp of the loss: how many equally likely tokens the model hesitates between."""
        return math.exp(min(self.validation_loss, MOST_LOSS))

    def line(self) -> str:
        """The log line, in the style of a step's."""
        return f"Validation step {self.step} loss: {self.validation_loss:.3f} perplexity: {self.perplexity:.3f}"

    def as_row(self) -> dict[str, float]:
        """One row of `validation.jsonl`."""
        return {**asdict(self), "perplexity": self.perplexity}

    def tagged(self) -> dict[str, float]:
        """The numbers by names like a step's."""
        return {"loss/validation_loss": self.validation_loss, "validation/perplexity": self.perplexity, "validation/time": self.time}


def json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON, which knows no NaN and no infinity: such a number (of a step that was left out) is null."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def memory(device: torch.device) -> tuple[float, float]:
    """Peak used and reserved memory in GiB: of the GPU since the last call, or this process's largest resident set so far."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
        return peaks
    peak = peak_resident() / GIB
    return peak, peak


def peak_resident() -> int:
    """The largest resident set of this process so far, in bytes.

    Not getrusage's: that begins with the peak of the process which started this one, as Linux keeps it across exec.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


def say(rank: int, message: str) -> None:
    """One log line of rank 0, on stdout, in XTuner's form."""
    if rank == 0:
        print(f"[XTuner][RANK {rank}][{datetime.now():%Y-%m-%d %H:%M:%S}][INFO] {message}", flush=True, file=sys.stdout)


def clock() -> float:
    """Seconds of a clock that never goes backward."""
    return time.monotonic()
