"""Where an answer ends, and what the base's licence is: read from a model folder, written into the exported one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner_core.checkpoint.hf import complete_generation_config, license_of
from xtuner_core.errors import DataError


def completed(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None, stops: list[int]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    complete_generation_config(folder, stops)
    return json.loads((folder / "generation_config.json").read_text())


def test_without_one_the_config_tells_its_tokens(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "hidden_size": 8}
    assert completed(tmp_path, config, None, []) == {"bos_token_id": 1, "eos_token_id": 2}


def test_the_end_of_a_turn_is_added_once_and_the_rest_stays(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    assert completed(tmp_path, {"eos_token_id": 9}, generation, [7]) == {**generation, "eos_token_id": [2, 5, 7]}
    assert completed(tmp_path, {}, None, [7])["eos_token_id"] == [2, 5, 7]


def test_a_single_end_is_no_list(tmp_path: Path) -> None:
    assert completed(tmp_path, {}, {"eos_token_id": None}, [7]) == {"eos_token_id": 7}


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_one_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json: (not readable as JSON|must be a mapping)"):
        complete_generation_config(tmp_path, [7])


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model"}, "apache-2.0"),
        ({"README.md": "---\r\nlicense: llama3\r\n---\r\n", "LICENSE": "MIT License"}, "llama3"),
        ({"README.md": "# A model without a header", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"README.md": "---\nlicense: [broken\n---\n", "LICENSE.txt": "   Apache License\n        Version 2.0, January"}, "apache-2.0"),
        ({"README.md": "---\nlicense: {a: b}\n---\n", "LICENSE": "All rights reserved"}, None),
    ],
)
def test_the_licence_is_what_the_folder_says(files: dict[str, str], licence: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert license_of(tmp_path) == licence
