"""The files that OpenCompass leaves: `out/<time>/{predictions,results}/<model>/<data set>.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.opencompass.process import failure


def model_output(work: Path, model: str, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A data set's predictions in the order they were asked, and its results.

    Raises:
        DataError: one of them is not there.
    """
    return list(_file(work, "predictions", model, name).values()), _file(work, "results", model, name)


def _file(work: Path, part: str, model: str, name: str) -> dict[str, Any]:
    for path in (work / "out").glob(f"*/{part}/{model}/{name}.json"):
        return json.loads(path.read_text(encoding="utf-8"))
    raise failure(work, f"left no {part} for {name}")


def verdicts(results: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What the scorer says of each of `count` answers; empty ones if it says nothing."""
    details = results.get("details")
    listed = details if isinstance(details, list) else [details.get(str(index)) for index in range(count)] if details else []
    listed = [detail if isinstance(detail, dict) else {} for detail in listed]
    return listed if len(listed) == count else [{} for _ in range(count)]
