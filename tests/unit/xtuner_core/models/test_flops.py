"""The operations of a token, as the benchmark's reference table has them, and the share of a device's best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_core.config import TrainConfig
from xtuner_core.models.flops import Costs, costs_of, matmul_sizes, peak_of
from xtuner_core.models.preset import preset_file

FULL, LORA = TrainConfig(), TrainConfig(method="lora")
TABLE = {  # matrix weights in billions, then GFLOP a token: full at 4096 and 8192 tokens, LoRA at 4096
    "qwen3-0.6b": (0.596, 4.99, 6.39, 3.79),
    "qwen3-1.7b": (1.720, 11.73, 13.14, 8.29),
    "qwen3-8b": (7.568, 49.0, 52.7, 33.9),
    "llama3-8b": (7.505, 48.3, 51.5, 33.2),
    "qwen3-moe-30ba3": (3.042, 23.1, 27.9, 17.0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A preset's config, with changes, in a folder of its own without weights."""

    def make(preset: str, **changes: object) -> Path:
        fields = {**json.loads(preset_file(preset).read_text()), **changes}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return make


def giga_a_token(costs: Costs, length: int) -> float:
    return costs.operations([length]) / length / 1e9


@pytest.mark.parametrize("preset", TABLE)
def test_published_models(preset: str, folder: Callable[..., Path]) -> None:
    full, lora = (costs_of(folder(preset), train) for train in (FULL, LORA))
    found = (full.matmul / 1e9, giga_a_token(full, 4096), giga_a_token(full, 8192), giga_a_token(lora, 4096))
    assert found == pytest.approx(TABLE[preset], rel=2e-3)


def test_only_pairs_within_a_document_and_its_window_count() -> None:
    plain, windowed = (Costs(0, 0, ((10, window),)) for window in (None, 4))
    assert plain.operations([3, 5]) == 6 * 10 * (9 + 25)
    assert windowed.operations([3, 4, 6]) == 6 * 10 * (9 + 16 + (36 - 4))
    assert Costs(7, 2, ()).operations([3, 5]) == (4 * 7 + 2 * 2) * 8


def test_gpt_oss_looks_through_its_windows(folder: Callable[..., Path]) -> None:
    costs = costs_of(folder("gpt-oss-20b"), FULL)
    assert sorted({window or 0 for _, window in costs.attention}) == [0, 128]
    assert 3.4e9 < costs.matmul < 3.7e9  # "3.6 B active", the embedding aside


def test_frozen_weights_have_no_gradient(folder: Callable[..., Path]) -> None:
    costs = costs_of(folder("qwen3-0.6b"), TrainConfig(freeze=("model.layers.0.*",)))
    one = 1024 * (2048 + 1024 + 1024 + 2048 + 3 * 3072)
    assert costs.matmul - costs.learned == one


def test_a_tied_embedding_counts_as_the_head_and_another_not() -> None:
    sizes = {}
    for tied in (True, False):
        config = AutoConfig.for_model(**{**json.loads(preset_file("qwen3-tiny").read_text()), "tie_word_embeddings": tied})
        with torch.device("meta"):
            sizes[tied] = matmul_sizes(AutoModelForCausalLM.from_config(config), 1.0)
    assert sum(sizes[True].values()) == sum(sizes[False].values())


def test_nothing_random_is_drawn(folder: Callable[..., Path]) -> None:
    before = torch.get_rng_state()
    costs_of(folder("qwen3-tiny"), FULL)
    assert torch.equal(before, torch.get_rng_state())


def test_the_best_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "Some GPU"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert [peak_of(torch.device("cuda"), FULL) for _ in range(4)] == [989e12, 312e12, 756e12, None]
    assert peak_of(torch.device("cpu"), FULL) is None
    assert peak_of(torch.device("cpu"), TrainConfig(peak_flops=1e12)) == 1e12
