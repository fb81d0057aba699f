"""Exporting a model takes memory by its largest tensor, not by its size."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import TensorSpec, serialize_file
from safetensors.torch import load_file

from pipelines.recipe import PROJECT

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 6, 32, 1024, 768, 16384
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
    "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": INNER, "vocab_size": VOCABULARY, "head_dim": 64,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 2, "tie_word_embeddings": True,
}  # fmt: skip
LARGEST = EXPERTS * 2 * INNER * HIDDEN * 4
EXPORT = """
import sys, threading, time
from pathlib import Path
import torch
from xtuner_core.export.checkpoint import open_checkpoint, to_hugging_face
from xtuner_core.export.tensors import finite, write_folder

def used(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

folder = Path(sys.argv[1])
tensors = to_hugging_face(folder, open_checkpoint(folder / "checkpoint"))
before, highest, done = [used("VmRSS"), used("RssAnon")], [0, 0], threading.Event()

def watch():
    while not done.wait(0.002):
        highest[:] = map(max, highest, (used("VmRSS"), used("RssAnon")))

watching = threading.Thread(target=watch)
watching.start()
write_folder({name: tensor.to(torch.bfloat16) for name, tensor in finite(tensors).items()}, folder)
done.set()
watching.join()
print(*(high - low for high, low in zip(highest, before)))
"""


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A config, and an fp32 checkpoint of 2 GB of two processes: fused experts, which the published form has one by one."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "checkpoint" / "tensors").mkdir(parents=True)
    numbers = torch.randn(LARGEST // 8)  # of every tensor
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = [EXPERTS, 2 * INNER, HIDDEN]
        shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = [EXPERTS, HIDDEN, INNER]
    for rank in range(2):
        half = {name: [shape[0] // 2, *shape[1:]] for name, shape in shapes.items()}
        told = {name: {"saved_offsets": [rank * shape[0], *[0] * (len(shape) - 1)]} for name, shape in half.items()}
        parts = {
            name: TensorSpec(dtype="float32", shape=shape, data_ptr=numbers.data_ptr(), data_len=4 * math.prod(shape))
            for name, shape in half.items()
        }
        serialize_file(parts, tmp_path / "checkpoint" / "tensors" / f"{rank}.safetensors", {"DCP_SHARDING_INFO": json.dumps(told)})
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(model: Path) -> None:
    """At most three times as much and 300 MB, of what a fused tensor of experts takes; mapped pages count too."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", EXPORT, str(model)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    resident, anonymous = map(int, done.stdout.split())
    assert anonymous <= resident <= 3 * LARGEST + 300e6
    assert resident >= LARGEST  # it was looked at
    found = load_file(model / "model.safetensors")
    assert len(found) == 2 + LAYERS * EXPERTS * 3
    assert found["model.layers.5.mlp.experts.31.down_proj.weight"].shape == (HIDDEN, INNER)
