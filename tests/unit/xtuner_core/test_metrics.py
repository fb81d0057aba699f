"""The log line, as the seeds print it, and its JSON twin."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from xtuner_core.metrics import MetricsLog, StepMetrics, ValidationMetrics, memory

SEEDS_LINE = (
    "Step 12/100 data_time: 0.0051 lr: 0.000008 time: 0.0509 text_tokens: 4010.0 total_loss: 9.007, reduced_llm_loss: 9.007 "
    "max_memory: 7.06 GB reserved_memory: 8.79 GB grad_norm: 5.998 tgs: 78743.6 e2e_tgs: 37460.4"
)
METRICS = StepMetrics(12, 100, 0.00512, 8e-6, 0.05091, 4010, 9.00689, 9.00689, 7.061, 8.789, 5.9981, 78743.61, 37460.42, 99.0, 0.979)


def test_the_line_is_the_seeds_line() -> None:
    assert METRICS.line() == SEEDS_LINE


def test_rank_0_prints_and_appends_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    for _ in range(2):  # a resumed run appends
        MetricsLog(file, rank=0).write(METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\[XTuner\]\[RANK 0\]\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]\[INFO\] " + re.escape(SEEDS_LINE), lines[0])
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    assert [(row["step"], row["total_loss"], row["eta"], row["pack_efficiency"]) for row in rows] == [(12, 9.00689, 99.0, 0.979)] * 2


def test_the_validation_line() -> None:
    metrics = ValidationMetrics(step=7, validation_loss=2.0, learned_tokens=30, time=0.5)
    assert metrics.line() == "Validation step 7 loss: 2.000 perplexity: 7.389"
    assert metrics.as_row() == {"step": 7, "validation_loss": 2.0, "learned_tokens": 30, "time": 0.5, "perplexity": pytest.approx(7.389056)}
    assert ValidationMetrics(7, 1e9, 30, 0.5).perplexity < float("inf")


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", rank=1).write(METRICS)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_memory_is_that_of_this_process() -> None:
    status = Path("/proc/self/status").read_text()
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert memory(torch.device("cpu")) == pytest.approx((int(peak) / 2**20,) * 2, rel=0.01)
