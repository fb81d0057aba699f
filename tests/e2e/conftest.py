"""A tiny model that learned two answers, for the tests that talk to a served one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtuner_core.models.preset import create_from_preset


def pytest_itemcollected(item: pytest.Item) -> None:
    if "prefect_server" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("prefect server"))


LEARNED = {"parcel": "shipping desk", "refund": "billing"}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests of this folder that ask for it; they stay on one worker."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    quick = {PREFECT_HOME: home, PREFECT_SERVER_ANALYTICS_ENABLED: False, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(quick), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `model` is a tiny Qwen3 that was trained on LEARNED until it knew it."""
    import torch
    from transformers import AutoModelForCausalLM

    # An `@` in a path means a revision to the server, unless we prevent it.
    folder = tmp_path_factory.mktemp("a@b c") / "model"
    create_from_preset("qwen3-tiny", folder, seed=0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _teach(model, folder, LEARNED)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder.parent


def _teach(model: Any, folder: Path, answers: dict[str, str]) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in answers.items()]
    whole = [tokenizer.apply_chat_template(row, return_tensors="pt", return_dict=False) for row in rows]
    for _ in range(60):
        for tokens in whole:
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="session")
def adapter(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the learned model that was taught one answer anew."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(learned / "model", dtype=torch.float32)
    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    _teach(model, learned / "model", {"parcel": "returns"})
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but no token ends its turn."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(learned / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 263, "pad_token_id": 258, "suppress_tokens": [263]}))
    return folder
