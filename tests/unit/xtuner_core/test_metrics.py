"""The log line, as the seeds print it, and its JSON twin."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xtuner_core.metrics import GIB, StepMetrics, ValidationMetrics, json_line, memory

SEEDS_LINE = (
    "Step 12/100 data_time: 0.0051 lr: 0.000008 time: 0.0509 text_tokens: 4010.0 total_loss: 9.007, reduced_llm_loss: 9.007 "
    "max_memory: 7.06 GB reserved_memory: 8.79 GB grad_norm: 5.998 tgs: 78743.6 e2e_tgs: 37460.4"
)
METRICS = StepMetrics(
    12, 100, 0.00512, 8e-6, 0.05091, 4010, 9.00689, 9.00689, 7.061, 8.789, 5.9981, 78743.61, 37460.42, 99.0, 0.979, 1200, 48120, 0.25, 0.41
)


def test_the_line_is_the_seeds_line() -> None:
    assert METRICS.line() == SEEDS_LINE


def test_tags_are_xtuner_s_and_finite() -> None:
    tags = METRICS.tagged()
    assert {
        "lr", "grad_norm", "loss/total_loss", "loss/reduced_llm_loss", "time/data_time", "time/step_time", "time/eta_seconds",
        "runtime_info/text_tokens", "runtime_info/tgs", "runtime_info/exp_tgs", "runtime_info/efficient_attn_ratio",
        "runtime_info/approximate_total_consumed_tokens", "memory/max_memory_GB", "memory/reserved_memory_GB", "runtime_info/mfu",
    } <= tags.keys()  # fmt: skip
    assert (tags["lr"], tags["runtime_info/mfu"], tags["loss/total_loss"]) == (8e-6, 0.41, 9.00689)
    left_out = replace(METRICS, total_loss=math.nan, grad_norm=math.inf, mfu=None).tagged()
    assert tags.keys() - left_out.keys() == {"loss/total_loss", "grad_norm", "runtime_info/mfu"}


def test_json_lines_are_strict() -> None:
    line = json_line(replace(METRICS, total_loss=math.nan, grad_norm=-math.inf, mfu=None).as_row())
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line.endswith("}\n") and (row["total_loss"], row["grad_norm"], row["mfu"], row["tgs"]) == (None, None, None, 78743.61)


def test_the_validation_line() -> None:
    metrics = ValidationMetrics(step=7, validation_loss=2.0, learned_tokens=30, time=0.5)
    assert metrics.line() == "Validation step 7 loss: 2.000 perplexity: 7.389"
    assert metrics.as_row() == {"step": 7, "validation_loss": 2.0, "learned_tokens": 30, "time": 0.5, "perplexity": pytest.approx(7.389056)}
    assert ValidationMetrics(7, 1e9, 30, 0.5).perplexity < float("inf")


def test_memory_is_that_of_this_process() -> None:
    status = Path("/proc/self/status").read_text()
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert memory(torch.device("cpu")) == pytest.approx((int(peak) / 2**20,) * 2, rel=0.01)


def test_peak_memory_is_this_process_s_own_not_that_of_the_one_that_started_it() -> None:
    ballast = torch.ones(GIB // 4)  # 1 GiB
    told = "import torch; from xtuner_core.metrics import memory; print(memory(torch.device('cpu'))[0])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert memory(torch.device("cpu"))[0] > ballast.nbytes / GIB > 0.9 > float(done.stdout)
