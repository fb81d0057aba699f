"""Stage prepare: files of samples → token ids with loss masks, kept per file → packs, with every line accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import shards
from pipelines.data_report import write_report
from pipelines.recipe import Recipe, resolve_path
from pipelines.splits import Portion, split
from pipelines.stage import Log, Metrics, Stage, Work
from xtuner_core.config import Source
from xtuner_core.errors import DataError, RecipeError

if TYPE_CHECKING:
    import numpy as np

    from xtuner_core.data.shard import Tally

KEPT_SAMPLES = 64
"""Conversations stored with their ids, for the check of the exported chat template."""
SHOWN_REJECTS = 20


@dataclass(frozen=True, slots=True)
class Input:
    """One input file and what the recipe says about it."""

    file: Path
    format: str
    sample_ratio: float
    validation: bool
    reason: str = "the recipe says so"
    """Why it is read as this format."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Write `documents/`, `packs/`, `validation/`, `data.json`, `samples.jsonl`, `kept.jsonl`; the report goes to the record.

    Raises:
        DataError: more lines rejected than `data.max_rejected` allows, or nothing is left to train on.
        RecipeError: a file is given twice and differently, or a word that is not known.
    """
    model_dir = work.inputs["base"] / "model"
    inputs, jobs, template = plan(recipe, model_dir, work.log)
    if shards.tokenize(jobs, work.cache, recipe.data.workers, work.log) and recipe.data.runner != "local":
        work.log(f"tokenized on this machine: only `xtuner run` and deployments use data.runner {recipe.data.runner}")
    tallies = [shards.read_tally(work.cache, job) for job in jobs]
    _account(recipe, work, inputs, jobs, tallies)
    folders = [work.payload / "documents" / f"{number:05d}" for number in range(len(jobs))]
    for job, folder in zip(jobs, folders, strict=True):
        shards.link(work.cache, job, folder)
    _merge(work.payload / "samples.jsonl", folders, KEPT_SAMPLES)
    if any(tally.kept for tally in tallies):
        _merge(work.payload / "kept.jsonl", folders)
    portions = [
        Portion(folder, one.sample_ratio, one.validation, int(job.digest[:16], 16))
        for folder, one, job in zip(folders, inputs, jobs, strict=True)
    ]
    metrics = _counts(tallies) | {"template": template} | _pack(recipe, work.payload, portions)
    _require_something(metrics, inputs)
    _describe(recipe, work.payload, model_dir, metrics)
    metrics["sources"] = [_source(one, tally) for one, tally in zip(inputs, tallies, strict=True)]
    write_report(work.payload, work.record, model_dir, [one.file for one in inputs], recipe, metrics)
    work.log(_told(metrics))
    return metrics


def plan(recipe: Recipe, model_dir: Path, log: Log) -> tuple[list[Input], list[shards.Job], str]:
    """The input files with their formats, what is to be tokenized, and the template."""
    from xtuner_core.data.render import choose_template
    from xtuner_core.data.shard import Encoding

    template = choose_template(model_dir, recipe.model.template)
    inputs = [_detected(one) for one in inputs_of(recipe)]
    _tell_formats(inputs, log)
    data = recipe.data
    encodings = [Encoding(one.format, template, data.loss, data.thinking, data.too_long, data.max_length) for one in inputs]
    return inputs, shards.make_jobs([one.file for one in inputs], encodings, model_dir), template


def inputs_of(recipe: Recipe) -> list[Input]:
    """Every input file once, in a fixed order: the recipe's sources in turn, then the files for validation.

    Raises:
        DataError: a path matches nothing.
        RecipeError: two sources name one file and differ in what they say about it.
    """
    from xtuner_core.data.inputs import input_files

    data = recipe.data
    given = [(source, False) for source in data.train]
    given += [(Source(path=path), True) for path in data.validation] if isinstance(data.validation, tuple) else []
    found: dict[Path, Input] = {}
    for source, validation in given:
        for file in input_files([resolve_path(source.path)]):
            one = Input(file, source.format or data.format, source.sample_ratio, validation)
            if found.setdefault(file, one) != one:
                raise RecipeError(f"{file}: named twice in data.train and data.validation, with different settings; name it once.")
    return list(found.values())


def files_of(recipe: Recipe) -> list[Path]:
    """The input files, in a fixed order."""
    return [one.file for one in inputs_of(recipe)]


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


def _account(recipe: Recipe, work: Work, inputs: Sequence[Input], jobs: Sequence[shards.Job], tallies: Sequence[Tally]) -> None:
    """Write `record/rejected.jsonl`, and fail if it is too long or a line is missing."""
    rejected = work.record / "rejected.jsonl"
    with open(rejected, "w", encoding="utf-8") as stream:
        for one, job in zip(inputs, jobs, strict=True):
            for row in _rows(work.cache / job.key / "rejected.jsonl"):
                stream.write(json.dumps({**row, "file": str(one.file)}, ensure_ascii=False) + "\n")
    for one, tally in zip(inputs, tallies, strict=True):
        if tally.accepted + tally.rejected + tally.blank + tally.dropped != tally.lines:
            raise AssertionError(f"{one.file}: lines do not add up: {tally}")
    count, usable = sum(tally.rejected for tally in tallies), sum(tally.lines - tally.blank for tally in tallies)
    allowed = recipe.data.max_rejected
    if count > allowed * usable:
        shown = "\n".join(f"  {row['file']}:{row['line']}: {row['reason']}" for row in islice(_rows(rejected), SHOWN_REJECTS))
        more = f"\n  … and {count - SHOWN_REJECTS} more" if count > SHOWN_REJECTS else ""
        raise DataError(
            f"{count} of {usable} lines rejected ({count / usable:.2%}), data.max_rejected allows {allowed:.2%}:\n{shown}{more}\n"
            f"All of them: {rejected}. Mend the lines, or allow them: --set data.max_rejected={_round_up(count / usable)}"
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


def _pack(recipe: Recipe, payload: Path, portions: Sequence[Portion]) -> Metrics:
    """Write `packs/`, and `validation/` if anything is kept back."""
    share = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
    train, held = split(portions, share, recipe.seed)
    lengths = _lengths(portions)
    packs, tokens = _write_packs(recipe, payload / "packs", train, lengths), int(lengths[train].sum())
    slots = packs * recipe.data.pack_length
    metrics: Metrics = {"packs": packs, "epoch_tokens": tokens, "pack_efficiency": round(tokens / slots, 6) if slots else 0.0}
    if len(held):
        kept = _write_packs(recipe, payload / "validation", held, lengths)
        metrics |= {"validation_packs": kept, "validation_documents": len(held), "validation_tokens": int(lengths[held].sum())}
    return metrics


def _lengths(portions: Sequence[Portion]) -> np.ndarray:
    import numpy as np

    from xtuner_core.data.dataset import Documents

    return np.concatenate([np.diff(Documents(portion.folder).offsets) for portion in portions])


def _write_packs(recipe: Recipe, folder: Path, numbers: np.ndarray, lengths: np.ndarray) -> int:
    """Pack the documents of these numbers; returns how many packs they fill."""
    from xtuner_core import registry
    from xtuner_core.data import packing
    from xtuner_core.data.dataset import write_packs

    packs = registry.find(packing, recipe.data.packing).pack(lengths[numbers], recipe.data.pack_length, recipe.seed)
    packs.slices[:, 0] = numbers[packs.slices[:, 0]]
    write_packs(folder, packs)
    return len(packs.offsets) - 1


def _require_something(metrics: Metrics, inputs: Sequence[Input]) -> None:
    if not metrics["packs"] and not metrics["kept"]:
        left_out = f" {metrics['dropped']} were dropped as too long (data.too_long)." if metrics["dropped"] else ""
        shown = ", ".join(str(one.file) for one in inputs[:5] if not one.validation)
        raise DataError(f"nothing to train on: no sample was accepted from {shown}.{left_out}")


def _describe(recipe: Recipe, payload: Path, model_dir: Path, metrics: Metrics) -> None:
    from xtuner_core.data.dataset import write_description
    from xtuner_core.data.tokenize import load_tokenizer

    chosen = {name: getattr(recipe.data, name) for name in ("pack_length", "packing", "order")}
    write_description(payload, {**metrics, **chosen, "vocab_size": load_tokenizer(model_dir).vocab_size})


def _source(one: Input, tally: Tally) -> dict[str, Any]:
    told = {"file": str(one.file), "format": one.format, "reason": one.reason, "sample_ratio": one.sample_ratio}
    return {**told, "split": "validation" if one.validation else "train", **asdict(tally)}


def _told(metrics: Metrics) -> str:
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


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All that decides bytes beside the files' own: not where they lie, nor who tokenizes them."""
    data = recipe.data.model_dump(mode="json", exclude={"train", "format", "workers", "runner"})
    inputs = [
        f"{'validation' if one.validation else 'train'} {shards.kind_of(one.file)} as {one.format} × {one.sample_ratio}"
        for one in inputs_of(recipe)
    ]
    if isinstance(recipe.data.validation, tuple):
        data["validation"] = "files"
    return {"data": data, "inputs": inputs, "template": recipe.model.template, "seed": recipe.seed, "code": _code()}


def _code() -> str:
    """Digest of the files behind the recipe's words: what a format, template or packing does is decided by its module."""
    from xtuner_core.data import formats, packing, templates

    modules = sorted(file for package in (formats, packing, templates) for folder in package.__path__ for file in Path(folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in modules)).hexdigest()


STAGE = Stage(name="prepare", version=2, run=run, settings=_settings, files=files_of, libraries=("tokenizers", "numpy"))
