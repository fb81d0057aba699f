"""Our side of benchmarks/data.py: the functions that stage prepare runs. Prints one line of JSON.

python data_ours.py chat INPUT MODEL_DIR OUTPUT_FOLDER     tokenize_part over the parts of the file, join_parts, packing, packs on disk
python data_ours.py plain INPUT MODEL_DIR OUTPUT_FOLDER    the same without packing
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from xtuner_core.data import formats, templates
from xtuner_core.data.dataset import Documents, write_packs
from xtuner_core.data.inputs import Part, parts_of
from xtuner_core.data.packing import best_fit
from xtuner_core.data.shard import Encoding, join_parts, tokenize_part
from xtuner_core.data.shards import PART_BYTES
from xtuner_core.registry import find

PACK_LENGTH = 4096


def chat(source: Path, model_dir: Path, folder: Path) -> dict[str, float]:
    """Rows → ids and masks → packs."""
    find(formats, "openai"), find(templates, "chatml"), find(formats, "text")  # imports are not counted
    start = start_cost(source, model_dir, folder)
    started = cpu()
    rows = tokenize(source, model_dir, folder, "openai")
    packs = best_fit.pack(np.diff(Documents(folder / "documents" / "00000").offsets), PACK_LENGTH, 0)
    write_packs(folder / "packs", packs)
    return {"cpu": cpu() - started, "rows": rows, "start": start}


def plain(source: Path, model_dir: Path, folder: Path) -> dict[str, float]:
    """Lines → ids on disk."""
    find(formats, "openai"), find(templates, "chatml"), find(formats, "text")  # imports are not counted
    start = start_cost(source, model_dir, folder)
    started = cpu()
    rows = tokenize(source, model_dir, folder, "text")
    return {"cpu": cpu() - started, "rows": rows, "start": start}


def tokenize(source: Path, model_dir: Path, folder: Path, data_format: str) -> int:
    """As stage prepare does it, part after part; returns the rows."""
    encoding = encoding_of(data_format)
    parts = [(part, folder / f"part{number:05d}") for number, part in enumerate(parts_of(source, PART_BYTES))]
    for part, target in parts:
        tokenize_part(part, model_dir, encoding, target)
    tally = join_parts([target for _, target in parts], folder / "documents" / "00000")
    assert tally.accepted == tally.lines, tally
    return tally.lines


def encoding_of(data_format: str) -> Encoding:
    """As recipes have it, with room for the longest row."""
    return Encoding(data_format, "chatml", "all", "keep", "drop", 10**9)


def start_cost(source: Path, model_dir: Path, folder: Path) -> float:
    """CPU-seconds to load the tokenizers, which a process pays once: an empty part of the file."""
    started, size = cpu(), source.stat().st_size
    tokenize_part(Part(source, size, size), model_dir, encoding_of("openai"), folder / "nothing")
    return cpu() - started


def cpu() -> float:
    """CPU-seconds of this process and its threads."""
    return time.process_time()


if __name__ == "__main__":
    _, action, source, other, output = sys.argv
    print(json.dumps({"chat": chat, "plain": plain}[action](Path(source), Path(other), Path(output))))
