"""How scores and differences are told in words, the same in the report, the page, the table and the gate's reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figure(value: float, unit: str) -> str:
    """A score: `96.5 %`, `1.204 nats per token`."""
    return f"{_number(value, unit)} {unit}".strip()


def amount(difference: float, unit: str) -> str:
    """A difference of two scores, without its sign: `12.5 points`, `0.1204 nats per token`."""
    return f"{_number(abs(difference), unit)} {_of_differences(unit)}".strip()


def signed(gain: float, unit: str) -> str:
    """A difference with its sign: `+12.5 points`."""
    return f"{_number(gain, unit, '+')} {_of_differences(unit)}".strip()


def span(difference: Mapping[str, Any], unit: str) -> str:
    """The interval of a difference of the verdict: `+7.1 to +17.9`; empty if it has none."""
    if difference["low"] is None:
        return ""
    return f"{_number(difference['low'], unit, '+')} to {_number(difference['high'], unit, '+')}"


def gained(difference: Mapping[str, Any], unit: str) -> str:
    """How much better than the other model, and how sure that is: `+12.5 points (+7.1 to +17.9)`."""
    interval = span(difference, unit)
    return signed(difference["value"], unit) + (f" ({interval})" if interval else "")


def percent(share: float) -> str:
    """`95 %` of 0.95."""
    return f"{100 * share:g} %"


def _of_differences(unit: str) -> str:
    return "points" if unit == "%" else unit


def _number(value: float, unit: str, sign: str = "") -> str:
    """Percentages to a tenth, other figures to four digits; what rounds to zero has no sign."""
    rounded = round(value, 1) if unit == "%" else float(f"{value:.4g}")
    sign = sign if rounded else ""
    return f"{rounded + 0.0:{sign}.1f}" if unit == "%" else f"{rounded + 0.0:{sign}.4g}"
