"""The GPU benchmark runs from end to end where there is no GPU, and counts FLOPs by the published definition."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[3]
BENCHMARKS = PROJECT / "benchmarks"


@pytest.fixture
def train_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("train_gpu")


@pytest.mark.parametrize(
    ("preset", "billions", "full", "lora"),
    [
        ("qwen3-0.6b", 0.596, 4.99, 3.79),
        ("qwen3-1.7b", 1.720, 11.73, 8.29),
        ("qwen3-8b", 7.568, 49.0, 33.9),
        ("llama3-8b", 7.505, 48.3, 33.2),
    ],
)
def test_flops_are_those_of_the_definition(train_gpu: ModuleType, preset: str, billions: float, full: float, lora: float) -> None:
    config = json.loads((train_gpu.PRESETS / f"{preset}.json").read_text(encoding="utf-8"))
    assert train_gpu.matrix_parameters(config) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert train_gpu.flops_per_token(config, "full", 4096) / 1e9 == pytest.approx(full, rel=2e-3)
    assert train_gpu.flops_per_token(config, "lora", 4096) / 1e9 == pytest.approx(lora, rel=2e-3)


def test_documents_fill_their_packs_and_only_tokens_that_see_each_other_count(train_gpu: ModuleType) -> None:
    mixed, full = (train_gpu.synthetic(4096, 8, 1000, whole) for whole in (False, True))
    for documents in (mixed, full):
        assert len(documents.sizes) == 8
        assert all(0.9 * 4096 < documents.tokens(pack) <= 4096 for pack in documents.packs())
        assert all(ids.min() >= 0 and ids.max() < 1000 for ids in documents.ids)
    assert full.sizes == [1] * 8
    assert train_gpu.effective_length(full) == 4096
    assert 545 < train_gpu.effective_length(mixed) < 4096  # the mean weighted by length is above the mean


@pytest.mark.slow
def test_the_dry_run_measures_both_sides_and_survives_a_row_that_is_too_large(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), "--dry-run", "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["ceilings"]["gemm_tflops"] > 0
    assert result["ceilings"]["copy_tb_per_second"] > 0
    rows = result["rows"]
    assert rows["qwen3-tiny too large full"]["sides"] == {"ours": {"failed": "out of memory"}}
    sides = rows["qwen3-tiny full"]["sides"]
    assert (len(sides["ours"]["runs"]), len(sides["flattened"]["runs"])) == (2, 1)
    assert sides["ours"]["losses"] == pytest.approx(sides["flattened"]["losses"], rel=0.005)  # same weights, tokens, order and update
    assert rows["qwen3-tiny lora"]["sides"]["padded"]["tokens_per_second"] > 0
    assert "out of memory" in done.stdout
