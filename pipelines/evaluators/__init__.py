"""How a model is judged: one module for each evaluator, found by the kinds of data set it offers. A module has:

* `KINDS: Mapping[str, Kind]`, the kinds of data set it offers; a kind belongs to one module
* `evaluate(model_dir, datasets, config, endpoint, work, log) -> dict[data set's name, DatasetScore]`: `datasets` have absolute paths;
  `endpoint` is where the model is served if `eval.engine` says so, else None; `work` is an empty folder for its records
* `versions() -> dict[str, str]`: the software besides ours that decides the answers; a change of it evaluates again
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to ask and count."""

    about: str
    """In a line, for `xtuner list-suites`."""
    needs_path: bool = True
    folder: bool = False
    """The path is a folder, not a file."""
    served: bool = False
    """It can be asked of a server (`eval.engine`); the others run in this machine's memory."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a data set's figure is told."""

    unit: str
    scale: float
    """The figure is the mean of the samples' scores times this."""
    higher_is_better: bool


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("%", 100.0, True),
    "loss": Metric("nats per token", 1.0, False),
}
"""Other names, as OpenCompass reports them, are figures where more is better."""
OTHER = Metric("", 1.0, True)


@dataclass(frozen=True, slots=True)
class Sample:
    """One question and what the model made of it."""

    question: str
    expected: str
    answer: str
    score: float
    """Of an accuracy 1.0 or 0.0; of a loss the nats per token."""
    weight: float = 1.0
    """Its share in the mean: of a loss the learned tokens."""

    @property
    def correct(self) -> bool:
        return self.score == 1.0


@dataclass(frozen=True, slots=True)
class DatasetScore:
    """A data set's result, samples in the order of its file."""

    metric: str
    samples: tuple[Sample, ...]
    reported: float | None = None
    """The figure itself where the evaluator tells no scores of samples."""
    extras: Mapping[str, float] = field(default_factory=dict)
    """Further figures, such as `perplexity`."""

    @property
    def value(self) -> float:
        """The data set's figure, in the metric's unit."""
        if self.reported is not None:
            return self.reported
        total = sum(sample.weight for sample in self.samples)
        return METRICS.get(self.metric, OTHER).scale * sum(sample.score * sample.weight for sample in self.samples) / total
