"""The data report as one HTML page: no script, no network; everything that comes from data or paths is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

from pipelines.page_parts import document, facts, safe, section, table
from pipelines.preview import Sample, short

_STYLE = """
:root { --learned: #d5efd9; --learned-ink: #0d5420; --control: #7a4a00; }
@media (prefers-color-scheme: dark) { :root { --learned: #173d22; --learned-ink: #a5e6b4; --control: #e5b567; } }
.learned { background: var(--learned); color: var(--learned-ink); } .control { color: var(--control); font-weight: 600; }
.learned.control { color: var(--learned-ink); text-decoration: underline; }
"""


def page(report: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The whole page."""
    parts = (
        f"<h1>Data of {safe(report['recipe'])}</h1>",
        _totals(report),
        section("What asks for attention", _attention(report)),
        section("Input files", _files(report["files"])),
        section("Lengths", _lengths(report["lengths"])),
        section("Packs and splits", _packing(report)),
        section("Rejected lines", _rejects(report["rejects"])),
        section("Duplicates", _duplicates(report["duplicates"])),
        section("Held-out questions in the data", _leakage(report["leakage"])),
        section("Samples as they are trained on", _samples(samples)),
    )
    return document(f"Data of {report['recipe']}", _STYLE, parts)


def _totals(report: Mapping[str, Any]) -> str:
    files = report["files"]
    total = {name: sum(file[name] for file in files) for name in ("lines", "accepted", "rejected", "blank", "dropped", "kept")}
    tokens, learned, documents = (sum(file[name] for file in files) for name in ("tokens", "learned", "documents"))
    figures = (
        ("documents", documents),
        ("tokens", tokens),
        ("learned", f"{learned / max(tokens, 1):.1%}"),
        ("packs", report["packing"]["packs"]),
        ("packs full", f"{report['packing']['pack_efficiency']:.2%}"),
        ("template", report.get("template", "")),
    )
    parts = " + ".join(f"{safe(total[name])} {name}" for name in ("accepted", "rejected", "blank", "dropped"))
    later = f" (of the accepted, {safe(total['kept'])} are preference pairs or prompts, kept for later use)" if total["kept"] else ""
    return facts(figures) + f"<p>{safe(total['lines'])} lines = {parts}{later}</p>"


def _attention(report: Mapping[str, Any]) -> str:
    duplicates, rejected = report["duplicates"], sum(group["lines"] for group in report["rejects"])
    leaked = sum(entry.get("whole", 0) for entry in report["leakage"])
    partly = sum(entry.get("overlap", 0) for entry in report["leakage"])
    unread = sum("problem" in entry for entry in report["leakage"])
    across = sum(duplicates[kind]["across"] for kind in ("exact", "near"))
    findings = (
        (rejected, "rejected lines"),
        (report["without_loss"]["documents"], "documents with nothing to learn"),
        (duplicates["exact"]["documents"], "exact copies of earlier documents"),
        (duplicates["near"]["documents"], "near copies of earlier documents"),
        (across, "copies between training and validation"),
        (leaked, "held-out questions in the data as a whole"),
        (partly, "held-out questions that share 13 words in a row with the data"),
        (unread, "held-out files that cannot be read"),
    )
    told = "".join(f'<p class="bad">{text}: {safe(count)}</p>' for count, text in findings if count)
    clear = ", no ".join(text for count, text in findings if not count)
    return told + (f'<p class="soft">No {clear}.</p>' if clear else "")


def _files(files: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            short(file["file"]),
            f"{file['format']}: {file['reason']}",
            file["split"] + ("" if file["sample_ratio"] == 1 else f" × {file['sample_ratio']:g}"),
            *(file[name] for name in ("lines", "accepted", "rejected", "documents", "tokens", "learned")),
            f"{file['share']:.1%}",
        )
        for file in files
    )
    return table(("file", "format", "for", "lines#", "accepted#", "rejected#", "documents#", "tokens#", "learned#", "share#"), rows)


def _lengths(lengths: Mapping[str, Any]) -> str:
    names = (("least", "shortest"), ("p5", "5 %"), ("median", "half"), ("p95", "95 %"), ("longest", "longest"))
    told = ", ".join(f"{name} {safe(lengths[key])}" for key, name in names)
    return _histogram(lengths) + f'<p class="soft">Tokens in a document: {told}.</p>'


_WIDTH, _HEIGHT, _FLOOR, _TOP = 900, 240, 205, 30


def _histogram(lengths: Mapping[str, Any]) -> str:
    """Bars over a logarithmic axis, inline SVG; both limits of the recipe as dashed lines."""
    edges, counts = lengths["edges"], lengths["documents"]
    limits = {name: lengths[name] for name in ("max_length", "pack_length")}
    first = next((index for index, count in enumerate(counts) if count), 0)
    left, right = log2(edges[first]) - 0.2, log2(max(edges[-1], *limits.values())) + 0.4

    def across(value: float) -> float:
        return (log2(value) - left) / (right - left) * _WIDTH

    most = max(counts, default=0) or 1
    bars = "".join(
        f'<rect class="bar" x="{across(low) + 1:.1f}" width="{across(high) - across(low) - 2:.1f}" '
        f'y="{_FLOOR - count / most * (_FLOOR - _TOP):.1f}" height="{count / most * (_FLOOR - _TOP):.1f}">'
        f"<title>{low} to {high - 1} tokens: {count} documents</title></rect>"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    ticks = "".join(
        f'<text x="{across(2**power):.1f}" y="{_FLOOR + 16}" text-anchor="middle">{2**power:,}</text>'
        for power in range(int(left) + 1, int(right) + 1)
    )
    name = " = ".join(limits) if len(set(limits.values())) == 1 else ""
    lines = "".join(
        f'<line class="limit" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{_TOP - 12}" y2="{_FLOOR}"/>'
        f'<text x="{across(value) - 4:.1f}" y="{_TOP - 14 + 12 * row}" text-anchor="end">{name or limit} {value:,}</text>'
        for row, (limit, value) in enumerate(limits.items())
        if not (name and row)
    )
    axis = f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_FLOOR}" y2="{_FLOOR}"/>'
    label = f'<text x="0" y="{_HEIGHT - 4}">tokens in a document (logarithmic); the highest bar is {most:,} documents</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Lengths of the documents">{axis}{bars}{ticks}{lines}{label}</svg>'


def _packing(report: Mapping[str, Any]) -> str:
    packing = report["packing"]
    mean, largest = packing["pack_cost_mean"], packing["pack_cost_max"]
    told = (
        f"{safe(packing['packs'])} packs of {safe(report['lengths']['pack_length'])} tokens by {safe(packing['packing'])}, "
        f"{packing['pack_efficiency']:.2%} full. Attention costs (Σ length² in a pack): mean {mean:,.0f}, "
        f"largest {largest:,.0f}, {largest / max(mean, 1):.2f} times the mean."
    )
    rows = ((name, split["documents"], split["tokens"]) for name, split in report["splits"].items() if split["documents"])
    return f"<p>{told}</p>" + table(("split", "documents#", "tokens#"), rows)


def _rejects(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return '<p class="good">None.</p>'
    rows = ((group["lines"], example["reason"], example["place"]) for group in groups for example in group["examples"][:1])
    more = "".join(
        f"<details><summary>{safe(group['lines'])} × {safe(group['reason'])}</summary>"
        + table(("line", "reason"), ((example["place"], example["reason"]) for example in group["examples"]))
        + "</details>"
        for group in groups
        if group["lines"] > 1
    )
    return table(("lines#", "reason, for example", "first line"), rows) + more + '<p class="soft">All of them: rejected.jsonl.</p>'


def _duplicates(found: Mapping[str, Any]) -> str:
    exact, near = found["exact"], found["near"]
    told = (
        f"Documents with the same tokens as an earlier one: {safe(exact['documents'])}. Documents that share at least 80 % of their "
        f"runs of five tokens with an earlier one (Jaccard similarity, without runs that many documents have): {safe(near['documents'])}."
    )
    if not near["complete"]:
        told += " There may be more: the data holds so many half-copies that the search was ended."
    rows = [(pair["copy"], pair["first"], "exact") for pair in exact["examples"]]
    rows += [(pair["copy"], pair["first"], f"{pair['similarity']:.0%}") for pair in near["examples"]]
    return f"<p>{told}</p>" + (table(("document", "is like", "similarity#"), rows) if rows else "")


def _leakage(entries: Sequence[Mapping[str, Any]]) -> str:
    readable = [entry for entry in entries if "problem" not in entry]
    rows = (
        (short(entry["file"]), ", ".join(entry["used_for"]), entry["questions"], entry["whole"], entry["overlap"]) for entry in readable
    )
    files = table(("held-out file", "used for", "questions#", "in the data as a whole#", "13 words in a row#"), rows)
    examples = [
        (example["question"], example["document"], "whole" if example["whole"] else "13 words", example["text"])
        for entry in readable
        for example in entry["examples"]
    ]
    problems = "".join(f'<p class="bad">{safe(entry["problem"])}</p>' for entry in entries if "problem" in entry)
    return files + (table(("question", "in the data", "what", "text"), examples) if examples else "") + problems


def _samples(samples: Sequence[Sample]) -> str:
    legend = '<span class="learned">the model learns to write this</span> · it only reads this · <span class="control">control token</span>'
    return f"<p>{legend}</p>" + "".join(f"<p><small>{safe(sample.title)}</small></p><pre>\n{_spans(sample)}</pre>" for sample in samples)


def _spans(sample: Sample) -> str:
    parts = []
    for span in sample.spans:
        kinds = " ".join(name for name, has in (("learned", span.learned), ("control", span.control)) if has)
        parts.append(f'<span class="{kinds}">{safe(span.text)}</span>' if kinds else safe(span.text))
    return "".join(parts)
