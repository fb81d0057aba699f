"""LMDeploy itself, in its environment without CUDA, knows what we pass. (tests/parity/test_portable_folder.py: it reads our folders.)"""

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
print(json.dumps(vars(CLI.parser.parse_args(sys.argv[1:])), default=str), flush=True)
CLI.parser.parse_args([*sys.argv[1:], "--no-such-flag"])
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
    assert parsed.returncode == 2 and "unrecognized arguments: --no-such-flag" in parsed.stderr


def test_it_answers_without_a_gpu(lmdeploy_python: Path) -> None:
    assert environments.check(f"lmdeploy{environments.WITHOUT_CUDA}") == []
    told = _in_lmdeploy(lmdeploy_python, "-m", "lmdeploy", "check_env").stdout
    assert "LMDeploy: 0.18.0" in told
    assert "CUDA available: " in told


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
