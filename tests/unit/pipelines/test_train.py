"""Stage train: what its record tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pipelines import train
from pipelines.recipe import load_recipe
from pipelines.stage import Work


def test_steps_that_were_left_out_are_counted_and_their_documents_named(
    tiny_model_folder: Path, tiny_data: Path, prepare_place: Callable[[], Work]
) -> None:
    place, lines = prepare_place(), []
    work = Work(
        {"base": tiny_model_folder.parent, "data": tiny_data}, place.payload, place.record, place.scratch, place.cache, lines.append
    )
    every_rise = ("train.skip_grad_norm_factor=1.000001", "train.skip_grad_norm_window=1", "train.max_skipped_steps=8")
    metrics = train.run(load_recipe("qwen3_tiny_full_openai", ("train.total_step=8", *every_rise)), work)
    rows = [json.loads(row) for row in (work.record / "metrics.jsonl").read_text().splitlines()]
    left_out, last = [], float("inf")
    for row in rows:
        if row["step"] > 1 and row["grad_norm"] > 1.000001 * last:
            left_out.append(row["step"])
        else:
            last = row["grad_norm"]
    assert (metrics["steps"], metrics["skipped_steps"]) == (8, len(left_out))
    told = [line for line in lines if "left out step" in line]
    assert left_out and [int(line.split("left out step ")[1].split(":")[0]) for line in told] == left_out
    assert all("Documents of the step: [" in line for line in told)
