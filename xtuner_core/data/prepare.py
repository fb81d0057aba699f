"""From files of samples to packed data: formats, template, shards of tokens, packs, with every line accounted for.

DIR/documents/ packs/ validation/ data.json    what training reads (layout: xtuner_core/data/dataset.py)
DIR/samples.jsonl kept.jsonl                   the first conversations with their ids; pairs and prompts for later use
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_core.config import DataConfig, Source
from xtuner_core.data import shards
from xtuner_core.data.splits import Portion, split
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.progress import Log

if TYPE_CHECKING:
    import numpy as np

    from xtuner_core.data.shard import Tally

KEPT_SAMPLES = 64
"""Conversations stored with their ids, for the check of the exported chat template."""
SHOWN_REJECTS = 20
Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """One input file and what the configuration says about it."""

    file: Path
    format: str
    sample_ratio: float
    validation: bool
    draw: int = 0
    """Which random part of the samples a broken ratio takes."""
    reason: str = "the recipe says so"
    """Why it is read as this format."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The input files, and for each what is to be tokenized."""

    inputs: list[Input]
    jobs: list[shards.Job]
    template: str


def make_plan(data: DataConfig, model_dir: Path, template: str, log: Log, resolve: Callable[[str], Path] = Path) -> Plan:
    """Find the input files, tell their formats, and digest them; `model_dir` has the tokenizer.

    Raises:
        DataError: a path matches nothing, or the format of a file cannot be told.
        RecipeError: two sources name one file and differ in what they say about it.
    """
    from xtuner_core.data.shard import Encoding

    inputs = [_detected(one) for one in inputs_of(data, resolve)]
    _tell_formats(inputs, log)
    encodings = [Encoding(one.format, template, data.loss, data.thinking, data.too_long, data.max_length) for one in inputs]
    return Plan(inputs, shards.make_jobs([one.file for one in inputs], encodings, model_dir), template)


def inputs_of(data: DataConfig, resolve: Callable[[str], Path] = Path) -> list[Input]:
    """Every input file once, in a fixed order: the sources in turn, then the files for validation.

    Raises:
        DataError: a path matches nothing.
        RecipeError: two sources name one file and differ in what they say about it.
    """
    from xtuner_core.data.inputs import input_files

    given = [(source, False) for source in data.train]
    given += [(Source(path=path), True) for path in data.validation] if isinstance(data.validation, tuple) else []
    found: dict[Path, Input] = {}
    for source, validation in given:
        for file in input_files([resolve(source.path)]):
            one = Input(file, source.format or data.format, source.sample_ratio, validation, source.draw)
            if found.setdefault(file, one) != one:
                raise RecipeError(f"{file}: named twice in data.train and data.validation, with different settings; name it once.")
    return list(found.values())


def _detected(one: Input) -> Input:
    from xtuner_core.data.detect import detect
    from xtuner_core.data.inputs import Part, rows

    if one.format != "auto":
        return one
    if all(row.blank or row.reason is not None for row in rows(Part(one.file))):
        return replace(one, format="openai", reason="no row in it can be read, so any will do")
    name, reason = detect(one.file)
    return replace(one, format=name, reason=reason)


def _tell_formats(inputs: Sequence[Input], log: Log) -> None:
    for name in dict.fromkeys(one.format for one in inputs):
        same = [one for one in inputs if one.format == name]
        more = f", and {len(same) - 1} more files" if len(same) > 1 else ""
        log(f"format {name}: {same[0].file.name} ({same[0].reason}){more}")


def write_data(plan: Plan, data: DataConfig, seed: int, cache: Path, folder: Path, rejected: Path) -> Metrics:
    """Make packed data in the existing directory `folder` from the plan's shards, which are in the cache; the counts, by name.

    Every line that cannot be used goes to the file `rejected`.

    Raises:
        DataError: more lines rejected than `data.max_rejected` allows, or nothing is left to train on.
        RecipeError: a word that is not known.
    """
    tallies = [shards.read_tally(cache, job) for job in plan.jobs]
    _account(plan, tallies, cache, rejected, data.max_rejected)
    folders = [folder / "documents" / f"{number:05d}" for number in range(len(plan.jobs))]
    for job, target in zip(plan.jobs, folders, strict=True):
        shards.link(cache, job, target)
    _merge(folder / "samples.jsonl", folders, KEPT_SAMPLES)
    if any(tally.kept for tally in tallies):
        _merge(folder / "kept.jsonl", folders)
    portions = [
        Portion(documents, one.sample_ratio, one.validation, int(job.digest[:16], 16) + one.draw)
        for documents, one, job in zip(folders, plan.inputs, plan.jobs, strict=True)
    ]
    metrics = _counts(tallies) | {"template": plan.template} | _pack(data, seed, folder, portions)
    _require_something(metrics, plan.inputs)
    _describe(data, folder, plan.jobs[0].model_dir, metrics)
    metrics["sources"] = [_source(one, tally) for one, tally in zip(plan.inputs, tallies, strict=True)]
    return metrics


def _account(plan: Plan, tallies: Sequence[Tally], cache: Path, rejected: Path, allowed: float) -> None:
    """Write the rejected lines, and fail if they are too many or a line is missing."""
    with open(rejected, "w", encoding="utf-8") as stream:
        for one, job in zip(plan.inputs, plan.jobs, strict=True):
            for row in _rows(cache / job.key / "rejected.jsonl"):
                stream.write(json.dumps({**row, "file": str(one.file)}, ensure_ascii=False) + "\n")
    for one, tally in zip(plan.inputs, tallies, strict=True):
        if tally.accepted + tally.rejected + tally.blank + tally.dropped != tally.lines:
            raise AssertionError(f"{one.file}: lines do not add up: {tally}")
    count, usable = sum(tally.rejected for tally in tallies), sum(tally.lines - tally.blank for tally in tallies)
    if count > allowed * usable:
        shown = "\n".join(f"  {row['file']}:{row['line']}: {row['reason']}" for row in islice(_rows(rejected), SHOWN_REJECTS))
        more = f"\n  … and {count - SHOWN_REJECTS} more" if count > SHOWN_REJECTS else ""
        raise DataError(
            f"{count} of {usable} lines rejected ({count / usable:.2%}), data.max_rejected allows {allowed:.2%}:\n{shown}{more}\n"
            f"All of them: {rejected}. Mend the lines, or allow them: data.max_rejected={_round_up(count / usable)}"
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _round_up(share: float) -> float:
    return min(1.0, int(share * 1000 + 1) / 1000)


def _merge(path: Path, folders: Sequence[Path], limit: int | None = None) -> None:
    """The first `limit` lines of the shards' files of this name, as one."""
    rows = (row for folder in folders for row in _lines(folder / path.name))
    with open(path, "wb") as stream:
        stream.writelines(islice(rows, limit))


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield from stream


def _counts(tallies: Sequence[Tally]) -> Metrics:
    total: Metrics = {name: sum(asdict(tally)[name] for tally in tallies) for name in asdict(tallies[0])}
    total["learned_tokens"] = total.pop("learned")
    return total


def _pack(data: DataConfig, seed: int, folder: Path, portions: Sequence[Portion]) -> Metrics:
    """Write `packs/`, and `validation/` if anything is kept back."""
    share = data.validation if isinstance(data.validation, float) else 0.0
    train, held = split(portions, share, seed)
    lengths = _lengths(portions)
    packs, tokens = _write_packs(data, seed, folder / "packs", train, lengths), int(lengths[train].sum())
    slots = packs * data.pack_length
    metrics: Metrics = {"packs": packs, "epoch_tokens": tokens, "pack_efficiency": round(tokens / slots, 6) if slots else 0.0}
    if len(held):
        kept = _write_packs(data, seed, folder / "validation", held, lengths)
        metrics |= {"validation_packs": kept, "validation_documents": len(held), "validation_tokens": int(lengths[held].sum())}
    return metrics


def _lengths(portions: Sequence[Portion]) -> np.ndarray:
    import numpy as np

    from xtuner_core.data.dataset import Documents

    return np.concatenate([np.diff(Documents(portion.folder).offsets) for portion in portions])


def _write_packs(data: DataConfig, seed: int, folder: Path, numbers: np.ndarray, lengths: np.ndarray) -> int:
    """Pack the documents of these numbers; returns how many packs they fill."""
    from xtuner_core import registry
    from xtuner_core.data import packing
    from xtuner_core.data.dataset import write_packs

    packs = registry.find(packing, data.packing).pack(lengths[numbers], data.pack_length, seed)
    packs.slices[:, 0] = numbers[packs.slices[:, 0]]
    write_packs(folder, packs)
    return len(packs.offsets) - 1


def _require_something(metrics: Metrics, inputs: Sequence[Input]) -> None:
    if not metrics["packs"] and not metrics["kept"]:
        left_out = f" {metrics['dropped']} were dropped as too long (data.too_long)." if metrics["dropped"] else ""
        shown = ", ".join(str(one.file) for one in inputs[:5] if not one.validation)
        raise DataError(f"nothing to train on: no sample was accepted from {shown}.{left_out}")


def _describe(data: DataConfig, folder: Path, model_dir: Path, metrics: Metrics) -> None:
    from xtuner_core.data.dataset import write_description
    from xtuner_core.data.tokenize import load_tokenizer

    chosen = {name: getattr(data, name) for name in ("pack_length", "packing", "order")}
    write_description(folder, {**metrics, **chosen, "vocab_size": load_tokenizer(model_dir).vocab_size})


def _source(one: Input, tally: Tally) -> dict[str, Any]:
    told = {"file": str(one.file), "format": one.format, "reason": one.reason, "sample_ratio": one.sample_ratio}
    return {**told, "split": "validation" if one.validation else "train", **asdict(tally)}


def told(metrics: Metrics) -> str:
    """What became of the lines, in one."""
    lines = ", ".join(f"{metrics[name]} {name}" for name in ("rejected", "blank", "dropped") if metrics[name])
    read = f"{metrics['accepted']} of {metrics['lines']} lines accepted" + (f" ({lines})" if lines else "")
    if not metrics["packs"]:
        return f"{read}; nothing in them can be trained on: {metrics['kept']} preference pairs and prompts are kept in kept.jsonl"
    kept = f"; {metrics['kept']} preference pairs and prompts are kept, not trained on" if metrics["kept"] else ""
    held = f"; {metrics['validation_documents']} documents for validation" if "validation_documents" in metrics else ""
    return (
        f"{read}: {metrics['tokens']} tokens ({metrics['learned_tokens']} learned) in {metrics['packs']} packs, "
        f"{metrics['pack_efficiency']:.1%} full; template {metrics['template']}{held}{kept}"
    )


def code_digest() -> str:
    """Digest of the files behind the configuration's words: what a format, template or packing does is decided by its module."""
    import hashlib

    from xtuner_core.data import formats, packing, templates

    modules = sorted(file for package in (formats, packing, templates) for folder in package.__path__ for file in Path(folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in modules)).hexdigest()
