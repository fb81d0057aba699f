"""Another chat template for a served model: told where it differs, refused where it cannot work, and really used."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.terminal.prompt_template import GONE, OLD_NAMES, template_name, with_template
from xtuner_core import registry
from xtuner_core.checkpoint.hf import eos_ids, read_generation_config
from xtuner_core.data import templates
from xtuner_core.data.render import PROBES, difference_from_own, own_ids
from xtuner_core.data.tokenize import load_tokenizer
from xtuner_core.errors import RecipeError


def test_names_of_today_and_of_old() -> None:
    known = registry.names(templates)
    assert [template_name(name) for name in known] == known
    assert template_name("internlm2_chat") == "internlm2"
    assert set(OLD_NAMES.values()) <= set(known)
    assert not set(GONE) & {*known, *OLD_NAMES}


def test_the_same_template_needs_no_copy(tiny_model_folder: Path) -> None:
    for name in (None, "chatml", "qwen_chat"):
        with with_template(tiny_model_folder, name, pytest.fail) as served:
            assert served == tiny_model_folder


def test_another_template_is_told_and_used_and_the_model_stays_as_it_is(tiny_model_folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny_model_folder.iterdir()}
    notes: list[str] = []
    with with_template(tiny_model_folder, "smollm2", notes.append) as served:
        assert difference_from_own(served, "smollm2") is None
        assert len(own_ids(served, PROBES)[0]) > len(own_ids(tiny_model_folder, PROBES)[0])
        end = load_tokenizer(served).control["<|im_end|>"]
        assert end in eos_ids(read_generation_config(served))
        assert {file.name for file in served.iterdir()} == set(before)
    assert not served.exists()
    assert "note: --prompt-template smollm2 is not the template exported with this model: conversation 0 differs at token" in notes[0]
    assert {file.name: file.read_bytes() for file in tiny_model_folder.iterdir()} == before


def test_a_template_that_cannot_work_is_refused(tiny_model_folder: Path) -> None:
    with (
        pytest.raises(RecipeError, match=r"its tokenizer has no <\|begin_of_text\|>.*, so template llama3 cannot be used"),
        with_template(tiny_model_folder, "llama3_chat", print),
    ):
        pytest.fail("served")
    with (
        pytest.raises(RecipeError, match="template qwen3_instruct exists only in models that bring it"),
        with_template(tiny_model_folder, "smollm2", print) as other,
        with_template(other, "qwen3_instruct", print),
    ):
        pytest.fail("served")
