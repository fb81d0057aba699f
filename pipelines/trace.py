"""Was a model trained on this line: which documents, packs and steps it became, or what became of it instead.

The order of the packs is a pure function of data, seed and step (xtuner_core/data/order.py), so nothing needs to have been written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines.lineage import Chain, Step
from pipelines.preview import Prepared, why_not
from xtuner_core.digest import sha256
from xtuner_core.errors import DataError, RecipeError

SHOWN_STEPS = 12
SHOWN_COPIES = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """The line that is asked about; `digest` of the file as it is now, None if there is none."""

    file: str
    line: int
    digest: str | None


@dataclass(frozen=True)
class Training:
    """A training of the chain, and the data that it read."""

    step: Step
    data: Step

    @property
    def steps(self) -> int:
        """Optimizer steps that are in the result."""
        metrics = self.step.manifest["metrics"]
        return metrics.get("best_step", metrics["steps"])

    @cached_property
    def prepared(self) -> Prepared:
        """
        Raises:
            DataError: the prepared data is not in the store any more.
        """
        if self.data.path is None:
            raise DataError(f"{self.data.id}, the data of {self.step.id}, is not in the store any more; run its recipe again to make it.")
        files = tuple(one["path"] for one in self.data.manifest["input_files"])
        return Prepared(self.data.path / "payload", self.data.path, files)  # the second is for showing tokens only

    def packs_of(self, document: int, split: str = "packs") -> list[int]:
        """The packs that hold the document or a part of it."""
        import numpy as np

        from xtuner_core.data.dataset import PackedDataset

        packs = PackedDataset(self.prepared.payload, split).packs
        return np.unique(np.searchsorted(packs.offsets, np.flatnonzero(packs.slices[:, 0] == document), "right") - 1).tolist()

    def steps_of(self, document: int) -> list[int]:
        """The optimizer steps, counted from 1 as in the log, that trained on the document or a part of it."""
        from xtuner_core.data.order import steps_of_packs

        settings = self.step.manifest["ingredients"]["settings"]
        size, packs = settings["train"]["global_batch_size"], self.packs_of(document)
        return [step + 1 for step in steps_of_packs(self.prepared.dataset, packs, self.steps, size, settings["seed"])]


def told(chain: Chain, place: str) -> Iterator[str]:
    """The answer for FILE:LINE, training by training, the first one first.

    Raises:
        RecipeError: `place` is not FILE:LINE, or the chain has no training.
    """
    asked = _asked(place)
    found = False
    for training in trainings(chain):
        if not training.data.manifest:
            found = True
            yield f"{training.step.id}: what it read cannot be told; {training.data.id}, its data, is gone or was edited"
        elif (index := _file_of(training, asked)) is not None:
            found = True
            yield from _became(training, asked, index)
    if not found:
        yield _unknown(chain, asked)


def trainings(chain: Chain) -> list[Training]:
    """Every training that the weights went through, the first one first.

    Raises:
        RecipeError: there is none.
    """
    known = {step.id: step for step in chain.steps}
    weights = [step for step in chain.ancestors() if step.reference["stage"] == "train" and "data" in step.inputs]
    if not weights:
        raise RecipeError(f"{chain.title}: no training is in its chain.")
    return [Training(step, known[step.inputs["data"]]) for step in weights]


def _asked(place: str) -> Asked:
    file, _, line = place.rpartition(":")
    if not file or not line.isdecimal():
        raise RecipeError(f"--sample {place}: write FILE:LINE, for example train.jsonl:3.")
    return Asked(file, int(line), sha256(Path(file)) if Path(file).is_file() else None)


def _file_of(training: Training, asked: Asked) -> int | None:
    """Which input file it is: the one with its bytes, else the one with its name."""
    files = training.data.manifest["input_files"]
    by_bytes = [index for index, one in enumerate(files) if one["sha256"] == asked.digest]
    by_path = [index for index, one in enumerate(files) if Path(one["path"]) == Path(asked.file).absolute()]
    by_name = [index for index, one in enumerate(files) if f"/{one['path']}".endswith(f"/{asked.file}")]
    for matches in (by_bytes, by_path, by_name):
        if len(matches) == 1:
            return matches[0]
    if len(by_name) > 1:
        raise RecipeError(f"{asked.file} means several input files: {', '.join(files[index]['path'] for index in by_name)}.")
    return None


def _became(training: Training, asked: Asked, index: int) -> Iterator[str]:
    import numpy as np

    one = training.data.manifest["input_files"][index]
    yield f"{training.step.id}: {one['path']} (sha256 {one['sha256']}) line {asked.line}"
    if asked.digest is None:
        yield "  no such file is here now; this is about the one that was read then"
    elif asked.digest != one["sha256"]:
        yield f"  the file here has changed since (sha256 {asked.digest}); this is about the line as it was then"
    if training.data.path is None:
        yield f"  this training read the file; {training.data.id}, which tells more, is not in the store any more"
        return
    prepared = training.prepared
    documents = np.flatnonzero(np.asarray(prepared.lines[index]) == asked.line) + prepared.starts[index]
    if not len(documents):
        yield f"  not trained on: no sample came from this line: {why_not(prepared, index, asked.line)}"
    for number in documents.tolist():
        yield from _document(training, number)


def _document(training: Training, number: int) -> Iterator[str]:
    prepared, metrics = training.prepared, training.step.manifest["metrics"]
    document = prepared.dataset.document(number)
    yield f"  document {number}: {len(document.ids)} tokens, {int(document.loss.sum())} learned"
    match prepared.splits[number]:
        case 0:
            yield "    not trained on: left out by its file's sample_ratio"
        case 2:
            yield f"    not trained on: kept back for the validation loss, validation pack {_list(training.packs_of(number, 'validation'))}"
        case _ if steps := training.steps_of(number):
            yield f"    trained on in pack {_list(training.packs_of(number))} at step {_list(steps)} of {training.steps}"
            if skipped := metrics.get("skipped_steps"):
                yield f"    ({skipped} steps of this training were left out; record/train.log of {training.step.id} says which)"
        case _:
            yield f"    not trained on: its pack {_list(training.packs_of(number))} was not yet due after {training.steps} steps"
    if copies := _copies(training, number):
        yield f"    the same text stands at {', '.join(copies)}"


def _copies(training: Training, number: int) -> list[str]:
    """Documents with just the same tokens, and what they are for."""
    import numpy as np

    from xtuner_core.data.splits import fingerprints
    from xtuner_core.data.statistics import SPLITS

    prepared = training.prepared
    prints = np.concatenate([fingerprints(shard.folder) for shard in prepared.dataset.shards])
    same = [other for other in np.flatnonzero(prints == prints[number]).tolist() if other != number]
    shown = [f"{prepared.place(other)} ({SPLITS[prepared.splits[other]]})" for other in same[:SHOWN_COPIES]]
    return [*shown, *([f"{len(same) - SHOWN_COPIES} more places"] if len(same) > SHOWN_COPIES else [])]


def _unknown(chain: Chain, asked: Asked) -> str:
    for step in chain.steps:
        for one in step.manifest.get("input_files", []):
            if asked.digest == one["sha256"]:
                return f"not trained on: {asked.file} was read by {step.node} ({step.id}), and by no training"
    bytes_ = f"its sha256 {asked.digest} is unknown" if asked.digest else "and no file of that name is here, so that its digest is unknown"
    return f"not in this model: {asked.file} is none of the files that it was trained on; {bytes_}"


def _list(numbers: list[int]) -> str:
    more = f", … ({len(numbers)} in all)" if len(numbers) > SHOWN_STEPS else ""
    return ", ".join(map(str, numbers[:SHOWN_STEPS])) + more
