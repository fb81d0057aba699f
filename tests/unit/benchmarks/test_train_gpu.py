"""The GPU benchmark runs from end to end where there is no GPU, and counts FLOPs as the engine does."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from xtuner_core.estimate import GIB, Load, memory
from xtuner_core.models.sizes import model_of_config

PROJECT = Path(__file__).resolve().parents[3]
BENCHMARKS = PROJECT / "benchmarks"


@pytest.fixture
def train_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("train_gpu")


def test_documents_fill_their_packs_and_only_tokens_that_see_each_other_count(train_gpu: ModuleType, tmp_path: Path) -> None:
    mixed, full = (train_gpu.synthetic(4096, 8, 1000, whole) for whole in (False, True))
    for documents in (mixed, full):
        assert len(documents.sizes) == 8
        assert all(0.9 * 4096 < documents.tokens(pack) <= 4096 for pack in documents.packs())
        assert all(ids.min() >= 0 and ids.max() < 1000 for ids in documents.ids)
    assert full.sizes == [1] * 8
    (tmp_path / "config.json").write_bytes((train_gpu.PRESETS / "qwen3-8b.json").read_bytes())
    assert train_gpu.flops_per_token(tmp_path, "full", full) / 1e9 == pytest.approx(49.0, rel=2e-3)
    assert 6 * 7.568 < train_gpu.flops_per_token(tmp_path, "full", mixed) / 1e9 < 49.0
    assert train_gpu.flops_per_token(tmp_path, "lora", full) / 1e9 == pytest.approx(33.9, rel=2e-3)


def test_settings_of_every_row_are_the_engine_s_and_fit_the_memory(train_gpu: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(dry_run=False, train={})
    for row in train_gpu.ROWS:
        model = model_of_config(json.loads((train_gpu.PRESETS / f"{row.preset}.json").read_text(encoding="utf-8")))
        assert model is not None
        for tight, gib in ((True, 78), (False, 139)):
            config = import_module("train_ours").config_of(train_gpu.job_of(row, tmp_path, arguments, tight), tmp_path)
            told = memory(model, config.train, Load(4096, 4096, 545, row.packs_per_step), "cuda")
            assert config.train.compile and told.total < gib * GIB, (row.name, told.told())


def test_a_side_that_ran_twice_is_told_by_its_mean(train_gpu: ModuleType) -> None:
    runs = [{"tokens_per_second": speed, "steps": 2, "peak_memory": speed, "losses": [speed]} for speed in (10.0, 30.0)]
    told = train_gpu.summary([*runs, {"failed": "out of memory"}], 1.0, {})
    assert (told["tokens_per_second"], told["runs"], told["peak_memory"], told["losses"]) == (20.0, [10.0, 30.0], 30.0, [10.0])


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
    assert (len(sides["ours"]["runs"]), len(sides["flattened"]["runs"])) == (1, 1)
    assert sides["ours"]["losses"] == pytest.approx(sides["flattened"]["losses"], rel=0.005)  # same weights, tokens, order and update
    assert rows["qwen3-tiny lora"]["sides"]["padded"]["tokens_per_second"] > 0
    assert "out of memory" in done.stdout
