"""One line a step: for people in the seeds' format, for programs as JSON."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch

GIB = 2**30
MOST_LOSS = 700.0
"""exp of more is no float."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step did. Times in seconds, memory in GiB, `tgs` tokens per second and device."""

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

    def line(self) -> str:
        """The log line, field for field as XTuner V1 prints it."""
        return (
            f"Step {self.step}/{self.total_step} data_time: {self.data_time:.4f} lr: {self.lr:.6f} time: {self.time:.4f} "
            f"text_tokens: {self.text_tokens:.1f} total_loss: {self.total_loss:.3f}, reduced_llm_loss: {self.reduced_llm_loss:.3f} "
            f"max_memory: {self.max_memory:.2f} GB reserved_memory: {self.reserved_memory:.2f} GB grad_norm: {self.grad_norm:.3f} "
            f"tgs: {self.tgs:.1f} e2e_tgs: {self.e2e_tgs:.1f}"
        )


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


def memory(device: torch.device) -> tuple[float, float]:
    """Peak used and reserved memory in GiB: of the GPU, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return peak, peak


class MetricsLog:
    """Prints the line of each step and appends it to `metrics.jsonl` (rank 0 only)."""

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        self._path = path

    def write(self, metrics: StepMetrics) -> None:
        say(self._rank, metrics.line())
        if self._rank == 0:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(metrics)) + "\n")


def say(rank: int, message: str) -> None:
    """One log line of rank 0, on stdout, in XTuner's form."""
    if rank == 0:
        print(f"[XTuner][RANK {rank}][{datetime.now():%Y-%m-%d %H:%M:%S}][INFO] {message}", flush=True, file=sys.stdout)


def clock() -> float:
    """Seconds of a clock that never goes backward."""
    return time.monotonic()
