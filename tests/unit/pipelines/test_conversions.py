"""`xtuner convert pth_to_hf` and its like, as typed: both spellings, what is said, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.cli import main


@pytest.mark.parametrize("command", ["pth_to_hf", "pth-to-hf"])
def test_a_checkpoint_becomes_a_folder(command: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(tiny_model_folder / "model.safetensors")
    torch.save({"state_dict": {f"llm.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "iter_9.pth")
    options = ["--base", str(tiny_model_folder), "--dtype", "float16", "--max-shard-size", "100KB"]
    assert main(["convert", command, str(tmp_path / "iter_9.pth"), str(tmp_path / "hf"), *options]) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert capsys.readouterr().out.splitlines() == ["iter_9.pth: 24 tensors of a whole model, named llm.…", str(tmp_path / "hf")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pth_to_hf", "config.py", "iter_9.pth", "hf"], 78, "takes the checkpoint and the folder to be made, no config"),
        (["pth_to_hf", "none.pth", "hf"], 78, "none.pth: there is no such file or folder"),
        (["pth_to_hf", "page.pth", "hf"], 65, "page.pth: no file of torch.save; it begins with '<html>"),
        (["internlm2_to_llama", "none", "hf"], 78, "none: there is no such folder"),
        (["llama-to-internlm2", "none", "hf"], 78, "none: there is no such folder"),
        (["to_gguf", "none", "m.gguf"], 78, "none: no model folder"),
        (["to-gguf", ".", "m.gguf"], 78, ".: no model folder"),
        (["from_gguf", "none.gguf", "hf"], 78, "none.gguf: there is no such file"),
        (["from-gguf", "page.pth", "hf"], 65, "page.pth: cannot be imported as a GGUF model"),
        (["from_gguf", "page.pth", "taken"], 78, "taken: exists already"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.pth").write_text("<html></html>")
    Path("taken").mkdir()
    assert main(["convert", *arguments]) == code
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.pth", "taken"]
