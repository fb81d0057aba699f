"""How OpenCompass is told of the model: its configuration as plain data (its usual form is a Python file that is executed)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.chatters import Endpoint
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError

CHAT, BASE = "model", "base"
"""What OpenCompass calls the model in its output folders: asked by its chat template, or given plain text."""
ROUND = [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}]
"""A conversation's shape; the default has an empty system turn behind the user's, which adds a line break to every question."""
META = {"round": ROUND, "reserved_roles": [{"role": "SYSTEM", "api_role": "SYSTEM"}]}
_PER_SECOND = 1000
_AHEAD = 1024
"""OpenCompass cuts answers short near its limit for a server; the real limit was checked already."""


def in_process(name: str, model_dir: Path, context: int, batch_size: int) -> dict[str, Any]:
    """The folder, loaded by OpenCompass itself in the precision of its weights, as servers load it; `name` is CHAT or BASE."""
    chat = {"type": "opencompass.models.HuggingFacewithChatTemplate", "meta_template": META}
    return {
        **(chat if name == CHAT else {"type": "opencompass.models.HuggingFaceBaseModel"}),
        "abbr": name,
        "path": str(model_dir.resolve()),
        "model_kwargs": {"device_map": "auto", "torch_dtype": "auto", "trust_remote_code": False},
        "tokenizer_kwargs": {"trust_remote_code": False},
        "generation_kwargs": {"do_sample": False},
        "max_seq_len": context,
        "batch_size": batch_size,
        "run_cfg": {"num_gpus": 0},
    }


def served(endpoint: Endpoint, tokenizer: Path, context: int, batch_size: int) -> dict[str, Any]:
    """The model behind an OpenAI-compatible server; the key comes from the environment, so that no file holds it."""
    return {
        "type": "opencompass.models.OpenAISDK",
        "abbr": CHAT,
        "path": endpoint.model,
        "openai_api_base": endpoint.base_url,
        "key": "ENV",
        "tokenizer_path": str(tokenizer.resolve()),
        "meta_template": META,
        "temperature": 0.0,
        "openai_extra_kwargs": {"temperature": 0.0},  # it leaves that away where the model's name has o1, o3, o4 or gpt-5 in it
        "max_seq_len": context + _AHEAD,
        "batch_size": batch_size,
        "max_workers": batch_size,
        "query_per_second": _PER_SECOND,
        "retry": 1,
        "run_cfg": {"num_gpus": 0},
    }


def bare_tokenizer(model_dir: Path, folder: Path) -> Path:
    """A folder with the tokenizer alone, which OpenCompass' client counts with: it would let a model folder's code run."""
    folder.mkdir()
    shutil.copyfile(model_dir / "tokenizer.json", folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def context_length(model_dir: Path) -> int:
    """The model's own limit, in tokens; without it OpenCompass would look it up with remote code allowed.

    Raises:
        DataError: this is no Hugging Face folder.
    """
    path = model_dir / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings", 4096))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not readable as a model's configuration ({error}). Give a Hugging Face model folder.") from None
