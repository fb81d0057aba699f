"""What our HTML pages share: one file without script or network, light and dark, all text from data or paths escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pipelines.preview import visible

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee5; --page: #fff; --box: #f5f7f9; --bar: #3b6ea5;
        --good: #17702f; --bad: #a8321f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #343c48; --page: #14181e; --box: #1d232b; --bar: #6ea3dc;
          --good: #7fd193; --bad: #f09080; } }
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
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, style: str, parts: Sequence[str]) -> str:
    """A whole page; `style` is the CSS it needs beyond what all pages have."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{safe(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def safe(value: Any) -> str:
    """Text of an element or attribute; a number with its thousands apart."""
    return escape(visible(f"{value:,}" if isinstance(value, int) else str(value)))


def section(title: str, body: str) -> str:
    """`body` is HTML, and so is `title`."""
    return f"<h2>{title}</h2>{body}"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are escaped; columns whose header ends with # are numbers."""
    css = [' class="number"' if header.endswith("#") else "" for header in headers]
    head = "".join(f"<th{kind}>{safe(header.rstrip('#'))}</th>" for header, kind in zip(headers, css, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{safe(cell)}</td>" for cell, kind in zip(row, css, strict=True)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Boxes, each a figure and its name."""
    return f'<div class="facts">{"".join(f"<div><b>{safe(value)}</b><small>{safe(name)}</small></div>" for name, value in pairs)}</div>'
