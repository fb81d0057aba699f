"""The data report as one HTML page: no script, no network; everything that comes from data or paths is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import log2
from typing import Any

from pipelines.preview import Sample, short, visible

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee5; --page: #fff; --box: #f5f7f9; --bar: #3b6ea5;
        --learned: #d5efd9; --learned-ink: #0d5420; --control: #7a4a00; --good: #17702f; --bad: #a8321f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #343c48; --page: #14181e; --box: #1d232b; --bar: #6ea3dc;
          --learned: #173d22; --learned-ink: #a5e6b4; --control: #e5b567; --good: #7fd193; --bad: #f09080; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft, small { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; margin-bottom: .8rem; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; } .number { text-align: right; white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--box); border-radius: .4rem; padding: .5rem .8rem; } .facts b { display: block; font-size: 1.25rem; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } .bar { fill: var(--bar); }
.limit { stroke: var(--bad); stroke-dasharray: 4 3; } .axis { stroke: var(--line); }
pre { background: var(--box); border-radius: .4rem; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.learned { background: var(--learned); color: var(--learned-ink); } .control { color: var(--control); font-weight: 600; }
.learned.control { color: var(--learned-ink); text-decoration: underline; }
"""


def page(report: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The whole page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f'<meta name="viewport" content="width=device-width"><title>Data of {_safe(report["recipe"])}</title><style>{_STYLE}</style>'
    parts = (
        f"<h1>Data of {_safe(report['recipe'])}</h1>",
        _totals(report),
        _section("What asks for attention", _attention(report)),
        _section("Input files", _files(report["files"])),
        _section("Lengths", _lengths(report["lengths"])),
        _section("Packs and splits", _packing(report)),
        _section("Rejected lines", _rejects(report["rejects"])),
        _section("Duplicates", _duplicates(report["duplicates"])),
        _section("Held-out questions in the data", _leakage(report["leakage"])),
        _section("Samples as they are trained on", _samples(samples)),
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _safe(value: Any) -> str:
    """Text of an element or attribute; a number with its thousands apart."""
    return escape(visible(f"{value:,}" if isinstance(value, int) else str(value)))


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are escaped; columns whose header ends with # are numbers."""
    css = [' class="number"' if header.endswith("#") else "" for header in headers]
    head = "".join(f"<th{kind}>{_safe(header.rstrip('#'))}</th>" for header, kind in zip(headers, css, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{_safe(cell)}</td>" for cell, kind in zip(row, css, strict=True)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _totals(report: Mapping[str, Any]) -> str:
    files = report["files"]
    total = {name: sum(file[name] for file in files) for name in ("lines", "accepted", "rejected", "blank", "dropped", "kept")}
    tokens, learned, documents = (sum(file[name] for file in files) for name in ("tokens", "learned", "documents"))
    facts = (
        ("documents", documents),
        ("tokens", tokens),
        ("learned", f"{learned / max(tokens, 1):.1%}"),
        ("packs", report["packing"]["packs"]),
        ("packs full", f"{report['packing']['pack_efficiency']:.2%}"),
        ("template", report.get("template", "")),
    )
    boxes = "".join(f"<div><b>{_safe(value)}</b><small>{name}</small></div>" for name, value in facts)
    parts = " + ".join(f"{_safe(total[name])} {name}" for name in ("accepted", "rejected", "blank", "dropped"))
    later = f" (of the accepted, {_safe(total['kept'])} are preference pairs or prompts, kept for later use)" if total["kept"] else ""
    return f'<div class="facts">{boxes}</div><p>{_safe(total["lines"])} lines = {parts}{later}</p>'


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
    told = "".join(f'<p class="bad">{text}: {_safe(count)}</p>' for count, text in findings if count)
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
    return _table(("file", "format", "for", "lines#", "accepted#", "rejected#", "documents#", "tokens#", "learned#", "share#"), rows)


def _lengths(lengths: Mapping[str, Any]) -> str:
    names = (("least", "shortest"), ("p5", "5 %"), ("median", "half"), ("p95", "95 %"), ("longest", "longest"))
    told = ", ".join(f"{name} {_safe(lengths[key])}" for key, name in names)
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
        f"{_safe(packing['packs'])} packs of {_safe(report['lengths']['pack_length'])} tokens by {_safe(packing['packing'])}, "
        f"{packing['pack_efficiency']:.2%} full. Attention costs (Σ length² in a pack): mean {mean:,.0f}, "
        f"largest {largest:,.0f}, {largest / max(mean, 1):.2f} times the mean."
    )
    rows = ((name, split["documents"], split["tokens"]) for name, split in report["splits"].items() if split["documents"])
    return f"<p>{told}</p>" + _table(("split", "documents#", "tokens#"), rows)


def _rejects(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return '<p class="good">None.</p>'
    rows = ((group["lines"], example["reason"], example["place"]) for group in groups for example in group["examples"][:1])
    more = "".join(
        f"<details><summary>{_safe(group['lines'])} × {_safe(group['reason'])}</summary>"
        + _table(("line", "reason"), ((example["place"], example["reason"]) for example in group["examples"]))
        + "</details>"
        for group in groups
        if group["lines"] > 1
    )
    return _table(("lines#", "reason, for example", "first line"), rows) + more + '<p class="soft">All of them: rejected.jsonl.</p>'


def _duplicates(found: Mapping[str, Any]) -> str:
    exact, near = found["exact"], found["near"]
    told = (
        f"Documents with the same tokens as an earlier one: {_safe(exact['documents'])}. Documents that share at least 80 % of their "
        f"runs of five tokens with an earlier one (Jaccard similarity, without runs that many documents have): {_safe(near['documents'])}."
    )
    if not near["complete"]:
        told += " There may be more: the data holds so many half-copies that the search was ended."
    rows = [(pair["copy"], pair["first"], "exact") for pair in exact["examples"]]
    rows += [(pair["copy"], pair["first"], f"{pair['similarity']:.0%}") for pair in near["examples"]]
    return f"<p>{told}</p>" + (_table(("document", "is like", "similarity#"), rows) if rows else "")


def _leakage(entries: Sequence[Mapping[str, Any]]) -> str:
    readable = [entry for entry in entries if "problem" not in entry]
    rows = (
        (short(entry["file"]), ", ".join(entry["used_for"]), entry["questions"], entry["whole"], entry["overlap"]) for entry in readable
    )
    table = _table(("held-out file", "used for", "questions#", "in the data as a whole#", "13 words in a row#"), rows)
    examples = [
        (example["question"], example["document"], "whole" if example["whole"] else "13 words", example["text"])
        for entry in readable
        for example in entry["examples"]
    ]
    problems = "".join(f'<p class="bad">{_safe(entry["problem"])}</p>' for entry in entries if "problem" in entry)
    return table + (_table(("question", "in the data", "what", "text"), examples) if examples else "") + problems


def _samples(samples: Sequence[Sample]) -> str:
    legend = '<span class="learned">the model learns to write this</span> · it only reads this · <span class="control">control token</span>'
    return f"<p>{legend}</p>" + "".join(f"<p><small>{_safe(sample.title)}</small></p><pre>\n{_spans(sample)}</pre>" for sample in samples)


def _spans(sample: Sample) -> str:
    parts = []
    for span in sample.spans:
        kinds = " ".join(name for name, has in (("learned", span.learned), ("control", span.control)) if has)
        parts.append(f'<span class="{kinds}">{_safe(span.text)}</span>' if kinds else _safe(span.text))
    return "".join(parts)
