"""vLLM cannot be installed beside a CPU's torch: what we pass is compared with a record of its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import chatters
from pipelines.chatters import vllm
from xtuner_core.errors import RecipeError

KNOWN = {"--served-model-name", "--host", "--port", "--allowed-origins"}
"""Of `vllm serve MODEL`, from vLLM's source: the first in vllm/engine/arg_utils.py, the others in vllm/entrypoints/openai/cli_args.py at
commit 0052233, where the origins are JSON."""


def test_it_is_given_only_arguments_that_it_knows(tmp_path: Path) -> None:
    program, serve, model, *options = vllm.command(tmp_path, 8001)
    assert (program, serve, model) == ("vllm", "serve", str(tmp_path))
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) <= KNOWN
    assert (given["--host"], given["--port"], given["--allowed-origins"]) == ("127.0.0.1", "8001", "[]")


def test_it_is_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="no `vllm` on the PATH"):
        chatters.choose("vllm")
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    assert chatters.choose("vllm") is vllm
