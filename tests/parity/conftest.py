"""Read model folders with our transformers, and with the transformers 4 of the OpenCompass environment as evaluation does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))  # for the modules beside the tests

IDS = list(range(40, 104))
MESSAGES = [{"role": "user", "content": "Wo ist Paket 4711?"}]
TEXT = "in 2026: 12,345 £ <|im_end|>\n\tünïcode"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one version of transformers makes of a folder."""

    logits: np.ndarray
    text: list[int]
    chat: list[int]

    def difference(self, other: Reading) -> float:
        """Largest difference of logits, relative to the largest logit."""
        return float(abs(self.logits - other.logits).max() / abs(self.logits).max())


Read = Callable[[list[Path], str], list[Reading]]
"""Folders and the dtype to compute in → a reading for each."""


@pytest.fixture(scope="session")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Read:
    from pipelines.environments import ensure

    python = ensure("opencompass", print)
    script = Path(__file__).parent / "read_with_transformers4.py"

    def read(folders: list[Path], dtype: str) -> list[Reading]:
        out = tmp_path_factory.mktemp("transformers4")
        request = out / "request.json"
        request.write_text(json.dumps({"ids": IDS, "dtype": dtype, "text": TEXT, "messages": MESSAGES}))
        command = [python, script, request, out, *folders]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [_reading(out / f"{index}.npz") for index in range(len(folders))]

    return read


def _reading(file: Path) -> Reading:
    with np.load(file) as out:
        return Reading(out["logits"], out["text"].tolist(), out["chat"].tolist())


@pytest.fixture(scope="session")
def transformers5() -> Read:
    return lambda folders, dtype: [_read(folder, dtype) for folder in folders]


def _read(folder: Path, dtype: str) -> Reading:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits.float().numpy()
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    return Reading(logits, tokenizer(TEXT)["input_ids"], chat)
