"""One rank under torchrun that builds one configuration after another and compares every tensor with those of a model it reads itself.

At last the ranks have models of different minds, and answer alike.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from xtuner_core import adapters, registry
from xtuner_core.build import build
from xtuner_core.config import SftConfig
from xtuner_core.models.load import load_model
from xtuner_core.parallel.mesh import gather_numbers, join_world, leave
from xtuner_core.samples import greedy


def is_tied(model: Any) -> bool:
    """Whether the head is the embedding."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


with join_world() as world:
    for file in sys.argv[1:]:
        config = SftConfig.model_validate_json(Path(file).read_text(encoding="utf-8"))
        model, _ = build(config, world)
        expected = load_model(config.model_dir, config.train)
        registry.find(adapters, config.train.method).prepare(expected, config.train, config.seed)
        for own, read in ((model.named_parameters, expected.named_parameters), (model.named_buffers, expected.named_buffers)):
            found, wanted = dict(own()), dict(read())
            assert found.keys() == wanted.keys(), config.model_dir
            for name, tensor in wanted.items():
                part = found[name]
                whole = part.full_tensor() if isinstance(part, DTensor) else part
                assert whole.dtype == tensor.dtype and torch.equal(whole, tensor), f"{config.model_dir}: {name}"
                assert part.requires_grad == tensor.requires_grad, name
        assert is_tied(model) == is_tied(expected)
        print(f"same on {world.rank}: {config.model_dir.name}", flush=True)
    torch.manual_seed(world.rank)
    own = AutoModelForCausalLM.from_config(expected.config, attn_implementation="sdpa").eval()
    answer = greedy(own, [1, 2], 8, frozenset(), world.device)
    assert gather_numbers(answer, world) == answer * world.size
leave(0)
