"""The operations that MFU counts are those that each architecture's forward pass makes, and its greedy answers are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_architectures import ARCHITECTURES, TINY, VOCABULARY, build
from torch.utils.flop_counter import FlopCounterMode

from xtuner_core.config import TrainConfig
from xtuner_core.models import attention
from xtuner_core.models.flops import costs_of
from xtuner_core.samples import greedy, speaking

TOKENS = 16
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_that_a_token_is_multiplied_with(name: str, tmp_path: Path) -> None:
    values = ARCHITECTURES[name]
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **values}))
    costs = costs_of(tmp_path, TrainConfig())
    model = build(values, "eager").eval()
    model.set_experts_implementation("eager")  # the counter does not know grouped products
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(TOKENS)[None] % VOCABULARY, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    assert costs.matmul == pytest.approx(sum(counts.get(product, 0) for product in PRODUCTS) / 2 / TOKENS, rel=0.01)
    assert costs.learned == costs.matmul
    scores = 2 * sum(width * TOKENS for width, _ in costs.attention)  # a full square here: twice what a causal mask leaves
    assert counts[torch.ops.aten.bmm] / 2 / TOKENS == pytest.approx(scores, rel=0.2)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_greedy_answers_with_a_cache_are_those_without(name: str) -> None:
    model, reference = build(ARCHITECTURES[name], attention.register()), build(ARCHITECTURES[name], "eager").eval()
    ids = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    with speaking(model, compiled=False):
        found = greedy(model, ids, 12, frozenset(), torch.device("cpu"))
    for token in found:
        with torch.no_grad():
            assert token == int(reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)
    assert model.training and model.config._attn_implementation == attention.NAME
