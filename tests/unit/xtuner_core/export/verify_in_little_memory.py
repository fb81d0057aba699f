"""`verify_in_little_memory.py FOLDER`: writes a random model of 1.1 GB, reads it back and lets it answer; prints what that took."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from xtuner_core.export.checkpoint import open_model, outline
from xtuner_core.export.tensors import Lazy, finite, open_folder, write_folder
from xtuner_core.export.verify import logits, noted, require_noted
from xtuner_core.metrics import peak_resident

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
PROBES = [list(range(first, first + 16)) for first in range(8)]


def random(shape: tuple[int, ...], block: torch.Tensor) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return block.repeat(-(-size // len(block)))[:size].view(shape)


def main(folder: Path) -> None:
    AutoConfig.for_model(**CONFIG).save_pretrained(folder)
    block = torch.randn(65537).mul(0.02).bfloat16()
    shapes = {name: tuple(parameter.shape) for name, parameter in outline(folder).named_parameters()}
    model = {name: Lazy(shape, torch.bfloat16, partial(random, shape, block)) for name, shape in shapes.items()}
    before, digests = peak_resident(), dict[str, str]()
    write_folder(noted(finite(model), digests), folder, "300MB")
    require_noted(open_folder(folder), digests)
    (first, *_) = logits(folder, open_model(folder), PROBES)
    assert first.isfinite().all() and len(digests) == len(model)
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * torch.float32.itemsize
    print(json.dumps({"grown": peak_resident() - before, "largest": largest, "model": sum(tensor.bytes for tensor in model.values())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
