"""A merge takes memory by its largest tensor, not by the model's size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from pipelines.recipe import PROJECT
from xtuner_core.export.checkpoint import outline
from xtuner_core.export.tensors import Lazy, open_folder, write_file, write_folder

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 3,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 4096, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
LARGEST = 2048 * 6144 * 4
MERGE = """
import sys, threading
from pathlib import Path
from xtuner_core.export.merge import merge

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, highest, done = anonymous(), 0, threading.Event()

def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())

watching = threading.Thread(target=watch)
watching.start()
place = Path(sys.argv[1])
merge(place / "base", [(place / "adapter", 1.0)], place / "merged")
done.set()
watching.join()
print(highest - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    model = outline(base)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    numbers = torch.randn(max(map(math.prod, shapes.values())))  # of every tensor
    write_folder({name: Lazy.of(numbers[: math.prod(shape)].view(shape)) for name, shape in shapes.items()}, base)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.peft_config["default"].save_pretrained(str(adapter))
    factors = {name: Lazy.of(torch.randn(tensor.shape)) for name, tensor in get_peft_model_state_dict(adapted).items()}
    write_file(adapter / "adapter_model.safetensors", factors)

    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 3 * LARGEST + 300e6 < sum(tensor.bytes for tensor in open_folder(base).values())
    found, stored = (open_folder(folder)["model.layers.2.mlp.up_proj.weight"].read() for folder in (tmp_path / "merged", base))
    assert not torch.equal(found, stored)
