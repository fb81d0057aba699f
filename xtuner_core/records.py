"""Where a step's numbers go: to the log, `metrics.jsonl`, the trackers, and a bar on a terminal; all of it on rank 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from xtuner_core import registry, trackers
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import Batch
from xtuner_core.durable import write_bytes
from xtuner_core.metrics import StepMetrics, ValidationMetrics, clock, json_line, memory, say
from xtuner_core.models.flops import Costs, costs_of, peak_of
from xtuner_core.parallel.mesh import World
from xtuner_core.progress import training_bar
from xtuner_core.trackers import Tracker

STEPS = "metrics.jsonl"
Show = Callable[[StepMetrics], None]


class Records:
    """Writes what a step did to all places; on other ranks than 0 to none."""

    def __init__(self, file: Path, run: RunClock, tracked: Mapping[str, Tracker], show: Show, rank: int) -> None:
        self._file, self._run, self._trackers, self._show, self._rank = file, run, dict(tracked), show, rank

    def step(self, step: int, batches: Sequence[Batch], rate: float, loss: float, grad_norm: float, started: float, loaded: float) -> None:
        """Record step `step` (from 1); `started` and `loaded` are the times when its batches were asked for and there."""
        metrics = self._run.metrics(step, batches, rate, loss, grad_norm, started, loaded)
        say(self._rank, metrics.line())
        if self._rank == 0:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json_line(metrics.as_row()))
            self._show(metrics)
            self._track(step, metrics.tagged())

    def validation(self, metrics: ValidationMetrics) -> None:
        """The log line of a measurement, and its numbers to the trackers."""
        say(self._rank, metrics.line())
        self._track(metrics.step, metrics.tagged())

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, values)
            except Exception as error:  # another's code, another's server: nothing of theirs may end a training
                del self._trackers[name]
                say(0, f"train.trackers: {name} failed at step {step} and is told nothing more: {error!r}")


@contextmanager
def open_records(config: SftConfig, first: int, total: int, dataset: PackedDataset, world: World) -> Iterator[Records]:
    """The records of a run that goes on after `first` of `total` steps.

    Raises:
        RecipeError: a tracker's package is not installed.
    """
    trackers.require_installed(config.train.trackers)
    file, peak = config.work_dir / STEPS, peak_of(world.device, config.train)
    best = None if peak is None else (costs_of(config.model_dir, config.train), peak)
    if world.rank == 0:
        _cut_torn_row(file)
    with ExitStack() as places:
        tracked = {name: opened for name in config.train.trackers if world.rank == 0 and (opened := _open(name, config, first, places))}
        show = places.enter_context(training_bar(first, total)) if world.rank == 0 else _show_nothing
        run = RunClock(first, total, _consumed(file, first) * world.size, dataset.description["pack_length"], world, best)
        yield Records(file, run, tracked, show, world.rank)


def _show_nothing(metrics: StepMetrics) -> None:
    pass


def _open(name: str, config: SftConfig, first: int, places: ExitStack) -> Tracker | None:
    """The tracker, closed with `places`; None, and a line in the log, if it can't be opened now: the training does not need it."""
    try:
        tracker: Tracker = registry.find(trackers, name).open_tracker(config.work_dir, config.model_dump(mode="json"), first)
    except Exception as error:
        say(0, f"train.trackers: {name} could not be opened and is left out: {error!r}")
        return None
    places.callback(_close, name, tracker)
    return tracker


def _close(name: str, tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:
        say(0, f"train.trackers: {name} could not be closed: {error!r}")


def _cut_torn_row(file: Path) -> None:
    """Drop the part of a row that a full disk or a power cut has left at the end, or the next row would be written into it."""
    rows = file.read_bytes() if file.exists() else b""
    if torn := len(rows.rpartition(b"\n")[2]):
        write_bytes(file, rows[:-torn])


def _consumed(file: Path, first: int) -> int:
    """Tokens of the steps up to `first` that the file tells; a resumed run repeats the steps after its checkpoint."""
    tokens: dict[int, int] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # the last one, torn when the run was killed
            row = json.loads(line)
            tokens[row["step"]] = row["text_tokens"]
    return sum(count for step, count in tokens.items() if step <= first)


class RunClock:
    """Turns what a step did into its metrics; knows since when this process trains.

    `first` steps and `consumed` tokens were done before; `best`, if known: the model's costs, and operations a second of the device.
    """

    def __init__(self, first: int, total: int, consumed: int, pack_length: int, world: World, best: tuple[Costs, float] | None) -> None:
        self._first, self._total, self._pack_length, self._world, self._best = first, total, pack_length, world, best
        self._started, self._tokens, self._consumed = clock(), 0, consumed

    def metrics(
        self, step: int, batches: Sequence[Batch], rate: float, loss: float, grad_norm: float, started: float, loaded: float
    ) -> StepMetrics:
        """What step `step` (from 1) did; `started` and `loaded` are the times when its batches were asked for and there."""
        now, tokens = clock(), sum(batch.text_tokens for batch in batches)
        self._tokens += tokens
        elapsed, spent = now - self._started, now - loaded
        used, reserved = memory(self._world.device)
        lengths = [length for batch in batches for length in batch.lengths]
        return StepMetrics(
            step=step, total_step=self._total, data_time=loaded - started, lr=rate, time=spent, text_tokens=tokens,
            total_loss=loss, reduced_llm_loss=loss, max_memory=used, reserved_memory=reserved, grad_norm=grad_norm, tgs=tokens / spent,
            e2e_tgs=self._tokens / elapsed, eta=elapsed / (step - self._first) * (self._total - step),
            pack_efficiency=tokens / (len(batches) * self._pack_length), learned_tokens=sum(batch.learned for batch in batches),
            consumed_tokens=self._consumed + self._tokens * self._world.size,
            efficient_attn_ratio=sum(length**2 for length in lengths) / sum(batch.text_tokens**2 for batch in batches),
            mfu=self._best and self._best[0].operations(lengths) / spent / self._best[1],
        )  # fmt: skip
