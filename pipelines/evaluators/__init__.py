"""How a model is judged: a module is found by its name, and has two functions:

* `evaluate(model_dir, config, work, log) -> dict[data set's name, DatasetScore]`; `work` is an empty folder for its records
* `versions() -> dict[str, str]`: the software besides ours that decides the answers; a change of it evaluates again
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One question and what the model made of it."""

    question: str
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class DatasetScore:
    """A data set's result, samples in the order of its file."""

    accuracy: float
    """Percent of the samples that are correct, 0 to 100."""
    samples: tuple[Sample, ...]

    @property
    def correct(self) -> int:
        return sum(sample.correct for sample in self.samples)

    @property
    def total(self) -> int:
        return len(self.samples)
