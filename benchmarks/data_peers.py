"""The peers' side of benchmarks/data.py; runs in the environment of constraints-peers.txt. Prints one line of JSON.

python data_peers.py chat INPUT MODEL_DIR OUTPUT      datasets.map(apply_chat_template, return_assistant_tokens_mask), then TRL's packing
python data_peers.py plain INPUT MODEL_DIR OUTPUT     json, then encode_batch_fast
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np

PACK_LENGTH = 4096
CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)


def chat(source: Path, model_dir: Path, output: Path) -> dict[str, float]:
    """Rows → ids and masks → packs."""
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHATML

    def encode(row: dict) -> dict:
        both = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": both["input_ids"], "assistant_masks": both["assistant_masks"]}

    started = cpu()
    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=str(output.parent / "hub"))
    assert isinstance(rows, Dataset)
    rows = rows.map(encode, remove_columns=rows.column_names, load_from_cache_file=False)
    tokenized = cpu()
    pack_dataset(rows, PACK_LENGTH, "bfd", {"load_from_cache_file": False})
    packed = cpu()
    columns = rows.with_format("arrow")[:]
    save(output, *(flat(columns[name]) for name in ("input_ids", "assistant_masks")), lengths(columns["input_ids"]))
    return {"cpu": packed - started, "cpu_without_packing": tokenized - started, "rows": len(rows)}


def plain(source: Path, model_dir: Path, output: Path) -> dict[str, float]:
    """Lines → ids on disk, a thousand at a time."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    sizes: list[int] = []
    started = cpu()
    with open(source, encoding="utf-8") as lines, open(output.with_suffix(".bin"), "wb") as ids:
        while batch := [json.loads(line)["text"] for _, line in zip(range(1000), lines, strict=False)]:
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            sizes += [len(encoding) for encoding in encodings]
            np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.uint32).tofile(ids)
    spent = cpu() - started
    save(output, np.fromfile(output.with_suffix(".bin"), np.uint32), np.zeros(0, bool), np.array(sizes))
    return {"cpu": spent, "rows": len(sizes)}


def cpu() -> float:
    """CPU-seconds of this process and its threads."""
    return time.process_time()


def flat(column) -> np.ndarray:
    """All values of a column of lists."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])


def lengths(column) -> np.ndarray:
    """Values of each list."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks])


def save(output: Path, ids: np.ndarray, loss: np.ndarray, sizes: np.ndarray) -> None:
    """What the other side compares its own with."""
    np.savez(output, ids=ids.astype(np.uint32), loss=loss.astype(bool), lengths=sizes.astype(np.int64))


if __name__ == "__main__":
    _, action, source, other, output = sys.argv
    print(json.dumps({"chat": chat, "plain": plain}[action](Path(source), Path(other), Path(output))))
