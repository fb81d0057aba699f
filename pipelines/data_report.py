"""The prepare stage's report: what became of every line, what the data looks like, and what in it asks for attention.

record/report.json     every figure, for programs
record/report.html     the same for people, one file that needs nothing else
record/preview.txt     a few samples as they are trained on
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts import sha256
from pipelines.heldout import read_heldout
from pipelines.preview import Prepared, choose, marked, rejected_rows, short
from pipelines.questions import read_choices, read_measured
from pipelines.recipe import Recipe, resolve_path
from pipelines.report_page import page
from pipelines.stage import Metrics
from pipelines.suites import chosen
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from xtuner_core.data.leakage import Leak

EXAMPLES = 5
"""Of each kind of finding; all rejected lines are in rejected.jsonl."""
SHOWN_SAMPLES = 3
SHOWN_TOKENS = 1000
MOST_GROUPS = 200

Place = Callable[[int], str]
"""Document number → file:line."""
Asked = tuple[str, str, str]
"""A held-out sample's file:line, question and answer."""


def write_report(payload: Path, record: Path, model_dir: Path, files: Sequence[Path], recipe: Recipe, metrics: Metrics) -> None:
    """Write report.json, report.html and preview.txt from a finished payload; `files` in the order of its documents folders."""
    prepared = Prepared(payload, model_dir, tuple(str(file) for file in files))
    report = describe(prepared, recipe, metrics)
    samples = [prepared.sample(number, most=SHOWN_TOKENS) for number in choose(prepared, SHOWN_SAMPLES, recipe.seed)]
    write_json(record / "report.json", report)
    write_bytes(record / "report.html", page(report, samples).encode())
    shown = "\n\n".join(marked(sample, tuple(prepared.tokenizer.control)) for sample in samples)
    write_bytes(record / "preview.txt", shown.encode() + b"\n")


def describe(prepared: Prepared, recipe: Recipe, metrics: Metrics) -> dict[str, Any]:
    """The report as JSON; the prepare stage's metrics are its first fields, their `sources` its `files`."""
    return {
        **{name: value for name, value in metrics.items() if name != "sources"},
        "recipe": recipe.name,
        "files": _files(prepared, metrics["sources"]),
        "lengths": _lengths(prepared, recipe),
        "packing": _packing(prepared, recipe),
        "splits": _splits(prepared),
        "rejects": _rejects(prepared),
        "without_loss": _without_loss(prepared),
        "duplicates": _duplicates(prepared),
        "leakage": _leakage(prepared, recipe),
    }


def _files(prepared: Prepared, sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the stage says of each file (format and why, sample_ratio, split), its counts, and its share of all tokens."""
    tallies = [json.loads((shard.folder / "tally.json").read_text(encoding="utf-8")) for shard in prepared.dataset.shards]
    total = sum(tally["tokens"] for tally in tallies) or 1
    return [
        {**source, **tally, "file": file, "share": round(tally["tokens"] / total, 6)}
        for source, tally, file in zip(sources, tallies, prepared.files, strict=True)
    ]


def _every_length(prepared: Prepared) -> np.ndarray:
    import numpy as np

    return np.concatenate([np.empty(0, np.int64), *(np.diff(shard.offsets) for shard in prepared.dataset.shards)])


def _lengths(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    import numpy as np

    from xtuner_core.data.statistics import histogram, length_bins

    lengths = _every_length(prepared)
    limits = {"max_length": recipe.data.max_length, "pack_length": recipe.data.pack_length}
    edges = length_bins(int(lengths.max(initial=1)))
    low, middle, high = (int(value) for value in np.percentile(lengths, [5, 50, 95])) if len(lengths) else (0, 0, 0)
    figures = {
        "least": int(lengths.min()) if len(lengths) else 0,
        "p5": low,
        "median": middle,
        "p95": high,
        "longest": int(lengths.max(initial=0)),
    }
    return {**figures, **limits, "edges": edges, "documents": histogram(lengths, edges)}


def _packing(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    from xtuner_core.data.pack import report

    return {"packing": recipe.data.packing, **report(prepared.dataset.packs, recipe.data.pack_length)}


def _splits(prepared: Prepared) -> dict[str, Any]:
    """Documents and tokens of each split, every document once whatever its sample_ratio."""
    from xtuner_core.data.statistics import SPLITS

    lengths = _every_length(prepared)
    masks = {name: prepared.splits == mark for mark, name in enumerate(SPLITS)}
    return {name: {"documents": int(mask.sum()), "tokens": int(lengths[mask].sum())} for name, mask in masks.items()}


def _rejects(prepared: Prepared) -> list[dict[str, Any]]:
    """Rejected lines by reason, the most frequent first; numbers and quoted words are left out of a group's reason."""
    groups: dict[str, dict[str, Any]] = {}
    for file, shard in zip(prepared.files, prepared.dataset.shards, strict=True):
        for row in rejected_rows(shard.folder):
            reason = general(row["reason"])
            reason = reason if reason in groups or len(groups) < MOST_GROUPS else "other reasons"
            group = groups.setdefault(reason, {"reason": reason, "lines": 0, "examples": []})
            group["lines"] += 1
            if len(group["examples"]) < EXAMPLES:
                group["examples"].append({"place": f"{short(file)}:{row['line']}", "reason": row["reason"]})
    return sorted(groups.values(), key=lambda group: -group["lines"])


def general(reason: str) -> str:
    """A reason without what differs from line to line."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason))


def _without_loss(prepared: Prepared) -> dict[str, Any]:
    import numpy as np

    from xtuner_core.data.statistics import learned_tokens

    shards = zip(prepared.starts, prepared.dataset.shards, strict=False)
    found = np.concatenate([np.empty(0, int), *(start + np.flatnonzero(learned_tokens(shard) == 0) for start, shard in shards)])
    return {"documents": len(found), "examples": [prepared.place(int(number)) for number in found[:EXAMPLES]]}


def _duplicates(prepared: Prepared) -> dict[str, Any]:
    """Copies of earlier documents; `across` of them have one side in training and the other in validation."""
    from xtuner_core.data.duplicates import find_duplicates

    found = find_duplicates(prepared.dataset.shards)
    exact = [{"first": prepared.place(int(first)), "copy": prepared.place(int(copy))} for first, copy in found.exact[:EXAMPLES]]
    near = [
        {"first": prepared.place(int(first)), "copy": prepared.place(int(copy)), "similarity": round(float(similarity), 3)}
        for (first, copy), similarity in zip(found.near[:EXAMPLES], found.similarity, strict=False)
    ]
    return {
        "exact": {"documents": len(found.exact), "across": _across(prepared, found.exact), "examples": exact},
        "near": {"documents": len(found.near), "across": _across(prepared, found.near), "examples": near, "complete": found.complete},
    }


def _across(prepared: Prepared, pairs: np.ndarray) -> int:
    return int((prepared.splits[pairs].sum(axis=1) == 1 + 2).sum())


def _leakage(prepared: Prepared, recipe: Recipe) -> list[dict[str, Any]]:
    """For each held-out file of the recipe, which of its questions stand in the prepared documents."""
    from xtuner_core.data.leakage import Question, find_leaks

    readable: list[tuple[dict[str, Any], list[Asked]]] = []
    entries = []
    for (path, kind), uses in _heldout_files(recipe).items():
        entries.append(_heldout_entry(path, uses))
        try:
            readable.append((entries[-1], _ASKED[kind](path)))
        except DataError as error:
            entries[-1]["problem"] = str(error)
    questions = [Question(text, answer) for _, asked in readable for _, text, answer in asked]
    leaks = {leak.question: leak for leak in find_leaks(prepared.dataset.shards, questions, prepared.tokenizer)}
    first = 0
    for entry, asked in readable:
        here = [(place, leaks[first + index]) for index, (place, _, _) in enumerate(asked) if first + index in leaks]
        entry |= {"questions": len(asked), **_leak_figures(here, prepared.place)}
        first += len(asked)
    return entries


def _heldout_files(recipe: Recipe) -> dict[tuple[Path, str], list[str]]:
    """Held-out file and how it is read → what the recipe uses it for."""
    uses: dict[tuple[Path, str], list[str]] = {}
    for one in chosen(recipe.eval):
        if one.dataset.path is not None and one.dataset.kind in _ASKED:
            uses.setdefault((Path(one.dataset.path), one.dataset.kind), []).append(f"eval {one.dataset.name}")
    if recipe.chat.prompts is not None:
        uses.setdefault((resolve_path(recipe.chat.prompts), "qa"), []).append("chat")
    return uses


def _conversations(path: Path) -> list[Asked]:
    return [(f"{short(str(path))}:{one.line}", one.messages[-1]["content"], one.expected) for one in read_heldout(path)]


def _choices(path: Path) -> list[Asked]:
    return [(short(one.place), one.question, one.choices[one.answer]) for one in read_choices(path)]


def _texts(path: Path) -> list[Asked]:
    """A plain text is its own question."""
    return [(short(one.place), one.question or one.text, one.text) for one in read_measured(path)]


_ASKED: Mapping[str, Callable[[Path], list[Asked]]] = {
    "qa": _conversations,
    "mcq": _choices,
    "ppl": _choices,
    "choice": _choices,
    "loss": _texts,
}
"""Kind of data set → its questions; the files of other kinds are not searched for."""


def _heldout_entry(path: Path, uses: Iterable[str]) -> dict[str, Any]:
    """The digest says for which bytes the finding holds: a later change of the file does not run prepare again."""
    return {"file": str(path), "used_for": list(uses), "sha256": sha256(path) if path.is_file() else None}


def _leak_figures(leaks: Sequence[tuple[str, Leak]], place: Place) -> dict[str, Any]:
    in_order = sorted(leaks, key=lambda pair: not pair[1].whole)
    examples = [
        {"question": asked, "document": place(leak.document), "whole": leak.whole, "text": leak.text} for asked, leak in in_order[:EXAMPLES]
    ]
    whole = sum(leak.whole for _, leak in leaks)
    return {"whole": whole, "overlap": len(leaks) - whole, "examples": examples}
