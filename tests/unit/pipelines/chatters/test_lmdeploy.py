"""LMDeploy itself, in its environment without CUDA: it knows what we pass, reads our folders, and asks as the model was trained."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipelines import chatters, environments
from pipelines.chatters import lmdeploy
from xtuner_core.errors import RecipeError

pytestmark = pytest.mark.slow

PARSE = """
import json, sys
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
SubCliServe.add_parsers()
print(json.dumps(vars(CLI.parser.parse_args(sys.argv[1:])), default=str))
"""

READ = """
import json, sys
from lmdeploy.archs import get_model_arch
from lmdeploy.model import get_chat_template
from lmdeploy.pytorch.configurations import AutoModelConfigBuilder
from lmdeploy.tokenizer import Tokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
architecture, config = get_model_arch(folder)
read = AutoModelConfigBuilder.build(config, folder)
tokens = Tokenizer(folder).encode(get_chat_template(folder).messages2prompt(messages), add_bos=False)
told = dict(architecture=architecture, layers=read.num_layers, vocabulary=read.vocab_size, eos=read.eos_token_id, tokens=tokens)
print(json.dumps(told))
"""


def _in_lmdeploy(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(python), *arguments], env=env, capture_output=True, text=True, check=False, timeout=300)


def test_it_knows_every_argument_we_pass(lmdeploy_python: Path, tmp_path: Path) -> None:
    module, *words = lmdeploy.arguments(tmp_path, 23456)[1:]
    assert module == "lmdeploy"
    parsed = _in_lmdeploy(lmdeploy_python, "-c", PARSE, *words)
    told = json.loads(parsed.stdout)
    assert (told["model_path"], told["model_name"]) == (str(tmp_path), "model")
    assert (told["server_name"], told["server_port"], told["api_keys"]) == ("127.0.0.1", 23456, None)
    assert (told["allow_origins"], told["disable_fastapi_docs"], told["trust_remote_code"]) == (["http://127.0.0.1"], True, False)
    refused = _in_lmdeploy(lmdeploy_python, "-c", PARSE, *words, "--no-such-flag")
    assert "unrecognized arguments: --no-such-flag" in refused.stderr


def test_it_answers_without_a_gpu(lmdeploy_python: Path) -> None:
    assert environments.check(f"lmdeploy{environments.WITHOUT_CUDA}") == []
    told = _in_lmdeploy(lmdeploy_python, "-m", "lmdeploy", "check_env").stdout
    assert "LMDeploy: 0.18.0" in told
    assert "CUDA available: " in told


def test_it_reads_our_folder_and_asks_the_model_as_it_was_trained(lmdeploy_python: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "With ünïcödé?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ]
    done = _in_lmdeploy(lmdeploy_python, "-c", READ, str(tiny_model_folder), json.dumps(messages))
    told = json.loads(done.stdout.splitlines()[-1])
    config = json.loads((tiny_model_folder / "config.json").read_text())
    assert (told["architecture"], told["layers"]) == (config["architectures"][0], config["num_hidden_layers"])
    assert (told["vocabulary"], told["eos"]) == (config["vocab_size"], config["eos_token_id"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert told["tokens"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(("gpu", "why"), [(False, "none is visible"), (True, "environment is not built. Run `xtuner env create lmdeploy`")])
def test_where_it_cannot_run_its_name_is_refused_and_auto_means_transformers(gpu: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "cuda_is_visible", lambda: gpu)
    monkeypatch.setattr(environments, "built", lambda name: None)
    with pytest.raises(RecipeError, match=why):
        chatters.choose("lmdeploy")
    assert chatters.choose("auto").__name__ == "pipelines.chatters.transformers"
    monkeypatch.setattr(environments, "cuda_is_visible", lambda: True)
    monkeypatch.setattr(environments, "built", lambda name: Path("python"))
    assert chatters.choose("auto") is lmdeploy
