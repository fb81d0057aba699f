"""One file becomes one shard, whatever the number of parts, and every line is accounted for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtuner_core.data.dataset import Documents, Piece
from xtuner_core.data.inputs import Part, parts_of
from xtuner_core.data.shard import Encoding, Tally, join_parts, read_tally, tokenize_part
from xtuner_core.data.tokenize import load_tokenizer

ENCODING = Encoding(format="openai", template="chatml", loss="all", thinking="keep", too_long="reject", max_length=200)


def chat(*answers: str, **extra: Any) -> str:
    turns = [turn for text in answers for turn in ({"role": "user", "content": "?"}, {"role": "assistant", "content": text, **extra})]
    return json.dumps({"messages": turns})


LINES = [chat("a"), "", chat("b", "c"), "{", chat("d" * 500), "  ", chat("<|im_end|>"), chat("é"), "[]"]
REASONS = ["not JSON", "522 tokens", "no messages"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def pieces(folder: Path) -> list[Piece]:
    documents = Documents(folder)
    return [documents.piece(index, index, 0, length) for index, length in enumerate(np.diff(documents.offsets).tolist())]


def learned(folder: Path, model: Path) -> list[str]:
    names = {number: name for name, number in load_tokenizer(model).control.items()}
    spans = [[number for first, end in piece.spans for number in piece.ids[first:end].tolist()] for piece in pieces(folder)]
    return ["".join(names.get(number) or chr(number) for number in ids) for ids in spans]


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_every_line_is_accounted_for(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tally = tokenize_part(Part(file), tiny_model_folder, ENCODING, tmp_path / "shard")
    assert (tally.lines, tally.blank, tally.accepted, tally.rejected, tally.dropped, tally.kept) == (9, 2, 4, 3, 0, 0)
    assert read_tally(tmp_path / "shard") == tally
    assert [(entry["line"], entry["byte_offset"]) for entry in rejected(tmp_path / "shard")] == [
        (number, sum(len(line) + 1 for line in LINES[: number - 1])) for number in (4, 5, 9)
    ]
    assert [entry["reason"].split(",")[0].split(":")[0] for entry in rejected(tmp_path / "shard")] == [
        "not JSON",
        "522 tokens",
        "no messages",
    ]
    assert np.load(tmp_path / "shard" / "lines.npy").tolist() == [1, 3, 7, 8]
    assert learned(tmp_path / "shard", tiny_model_folder) == [
        "a<|im_end|>",
        "b<|im_end|>c<|im_end|>",
        "<|im_end|><|im_end|>",
        "Ã©<|im_end|>",
    ]


@pytest.mark.parametrize("size", [1, 60, 200, 10_000])
def test_parts_joined_are_the_whole(file: Path, tiny_model_folder: Path, tmp_path: Path, size: int) -> None:
    whole = tokenize_part(Part(file), tiny_model_folder, ENCODING, tmp_path / "whole")
    parts = parts_of(file, size)
    folders = [tmp_path / f"part-{index}" for index in range(len(parts))]
    tallies = [tokenize_part(part, tiny_model_folder, ENCODING, folder) for part, folder in zip(parts, folders, strict=True)]
    assert sum(tallies, Tally()) == whole == join_parts(folders, tmp_path / "joined")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "joined").iterdir()} >= {"ids.bin", "offsets.npy", "loss.npy", "lines.npy"}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "joined" / name).read_bytes(), name


def test_dropped_lines_are_counted_not_rejected(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tally = tokenize_part(Part(file), tiny_model_folder, replace(ENCODING, too_long="drop"), tmp_path / "shard")
    assert (tally.accepted, tally.rejected, tally.dropped) == (4, 2, 1)


def test_only_the_last_answer(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tokenize_part(Part(file), tiny_model_folder, replace(ENCODING, loss="last"), tmp_path / "shard")
    assert learned(tmp_path / "shard", tiny_model_folder)[1] == "c<|im_end|>"


def test_samples_keep_what_other_programs_would_encode_alike(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tokenize_part(Part(file), tiny_model_folder, ENCODING, tmp_path / "shard")
    samples = [json.loads(line) for line in (tmp_path / "shard" / "samples.jsonl").read_text().splitlines()]
    assert [sample["messages"][1]["content"] for sample in samples] == ["a", "b", "é"]
    assert samples[0]["ids"] == pieces(tmp_path / "shard")[0].ids.tolist()


def test_long_texts_become_chunks_of_the_same_line(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("x" * 1000, "yz")) + "\n")
    tally = tokenize_part(Part(path), tiny_model_folder, replace(ENCODING, format="text"), tmp_path / "shard")
    assert (tally.lines, tally.accepted, tally.documents) == (2, 2, 7)
    assert np.load(tmp_path / "shard" / "lines.npy").tolist() == [1] * 6 + [2]
    assert "".join(learned(tmp_path / "shard", tiny_model_folder)[:6]) == "x" * 999 + "<|eos|>"
    assert learned(tmp_path / "shard", tiny_model_folder)[6] == "z<|eos|>"


def test_kept_lines_and_samples_of_joined_parts(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(number), "chosen": "4", "rejected": "5"}) + "\n" for number in range(5)))
    folders = []
    for part in parts_of(path, 60):
        folders.append(tmp_path / f"part-{len(folders)}")
        tokenize_part(part, tiny_model_folder, replace(ENCODING, format="preference"), folders[-1])
    assert len(folders) > 1
    join_parts(folders, tmp_path / "joined")
    kept = [json.loads(line) for line in (tmp_path / "joined" / "kept.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["prompt"][-1]["content"]) for entry in kept] == [(number + 1, str(number)) for number in range(5)]


def test_preferences_are_kept(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2", "chosen": "4", "rejected": "5"}) + "\n")
    tally = tokenize_part(Part(path), tiny_model_folder, replace(ENCODING, format="preference"), tmp_path / "shard")
    assert (tally.accepted, tally.kept, tally.documents) == (1, 1, 0)
    [kept] = [json.loads(line) for line in (tmp_path / "shard" / "kept.jsonl").read_text().splitlines()]
    assert kept["kind"] == "preference" and kept["line"] == 1
    assert [kept[part][-1]["content"] for part in ("prompt", "chosen", "rejected")] == ["2 + 2", "4", "5"]
