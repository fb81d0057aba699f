"""The engine's command line: every field has its flag, a mistake is told, a file and flags go together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe import PROJECT, shipped_names
from xtuner_core.arguments import XTUNER_NAMES, flags, parse, table, write_table
from xtuner_core.config import DataConfig, Source, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.run_config import RunConfig, merge, read_tree, whole_run

MODEL = ["--model-cfg", "qwen3-tiny", "--dataset", "a.jsonl"]


def run_of(*words: str, tree: dict[str, Any] | None = None, processes: int = 1) -> RunConfig:
    return whole_run(merge(tree or {}, parse(words).values), "command line", processes)


def test_every_field_is_a_flag_and_says_what_it_means() -> None:
    dotted = {flag.dotted for flag in flags()}
    fields = {f"train.{name}" for name in TrainConfig.model_fields} | {f"data.{name}" for name in DataConfig.model_fields}
    started_elsewhere = {"train.processes", "train.launcher", "data.runner"}
    nested = {name for name in fields if any(other.startswith(f"{name}.") for other in dotted)}
    assert fields - dotted == started_elsewhere | nested and "train.lora" in nested
    assert dotted >= {"seed", "resume", "work_dir", "train.lora.rank", "train.checkpoint_interval"}
    assert all(flag.info.description and flag.info.description.endswith((".", "*")) for flag in flags())
    assert set(XTUNER_NAMES.values()) <= dotted
    names = [name for flag in flags() for name in flag.names]
    assert len(names) == len(set(names))


def test_the_documentation_has_the_table_of_flags() -> None:
    text = (PROJECT / "docs" / "engine.md").read_text(encoding="utf-8")
    assert table() in text, "a field changed: run python -m xtuner_core.arguments, which writes the table"


def test_writing_the_table_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    file, old = tmp_path / "a.md", "".join(line + "\n" for line in table().splitlines()[:3])
    file.write_text(f"# a\n\n{old}\nb | c\n")
    write_table(file)
    assert file.read_text() == f"# a\n\n{table()}\nb | c\n"


@pytest.mark.parametrize("form", ["--total_step=7", "--total-step 7", "--train.total_step 7", "--train.total-step=7"])
def test_dashes_and_underscores_short_and_whole_names_are_the_same(form: str) -> None:
    assert run_of(*MODEL, *form.split()).train.total_step == 7


def test_values_have_the_types_of_their_fields() -> None:
    words = (
        "--lr 1e-4 --optim AdamW --scheduler-type Linear --chat_template gpt-oss --betas 0.8 0.9 --freeze a,b --lora.targets q_proj v_proj"
    )
    run = run_of(*MODEL, *words.split(), "--no-resume", "--lora.rslora", "--work-dir", "2024", "--validation", "0.25")
    assert (run.train.lr, run.train.optimizer, run.train.scheduler, run.model.template) == (1e-4, "adamw", "linear", "gpt_oss")
    assert (run.train.betas, run.train.freeze, run.train.lora.targets) == ((0.8, 0.9), ("a", "b"), ("q_proj", "v_proj"))
    assert (run.resume, run.train.lora.rslora, run.work_dir, run.data.validation) == (False, True, Path("2024"), 0.25)
    assert run_of(*MODEL, "--resume", "off", "--lora.rslora", "false").resume is False


def test_xtuner_s_own_names_of_memory_settings_are_understood() -> None:
    words = (
        "--fsdp-config.cpu-offload --fsdp-config.hsdp_sharding_size 2 --fsdp-config.reshard-after-forward False "
        "--fsdp-config.torch-compile true --fsdp-config.recompute-ratio 0.5 --recompute full"
    )
    train = run_of(*MODEL, *words.split()).train
    assert (train.fsdp.cpu_offload, train.fsdp.sharding_size, train.fsdp.reshard_after_forward) == (True, 2, False)
    assert (train.compile, train.recompute, train.recompute_ratio) == (True, "full", 0.5)


@pytest.mark.parametrize("prompt", ["Explain setup.py", "3.5", "7"])
def test_a_prompt_may_look_like_a_program_or_a_number(prompt: str) -> None:
    assert run_of(*MODEL, "--sample-prompts", prompt).train.sample_prompts == (prompt,)


def test_data_files_are_named_in_every_form() -> None:
    model = ["--model-cfg", "qwen3-tiny"]
    assert [source.path for source in run_of(*model, "--dataset", "a.jsonl", "b.jsonl").data.train] == ["a.jsonl", "b.jsonl"]
    assert run_of(*model, "--dataset", "[ab]*.jsonl").data.train == (Source(path="[ab]*.jsonl"),)
    half = run_of(*model, "--dataset", '{"path": "a.jsonl", "sample_ratio": 0.5}').data.train
    assert half == (Source(path="a.jsonl", sample_ratio=0.5),)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lrr", "3"], "--lrr: no such flag; did you mean --lr?"),
        (["--lr"], "expected one argument"),
        ([*MODEL, "--lr", "-3"], "command line: train.lr: Input should be greater than 0"),
        ([*MODEL, "--epoch-num", "1", "--total-step", "2"], "epochs or total_step, not both"),
        (["--dataset", "a.jsonl"], "give --load-from FOLDER .* or --model-cfg PRESET.*: one of them"),
        ([*MODEL, "--load-from", "x"], "not both"),
        (["--model-cfg", "qwen3-tiny"], "no training data; give --dataset"),
        (["--model-cfg", "qwen3-tiny", "--dataset", "data.py"], r"--dataset data\.py: a configuration is data and never a program"),
        ([*MODEL, "--max-length", "4096", "--pack-max-length", "1024"], r"max_length \(4096\) is greater than pack_length \(1024\)"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(words: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        run_of(*words)


def test_of_the_two_lengths_the_one_not_given_follows() -> None:
    given = ([], ["--pack-max-length", "512"], ["--max-length", "8192"], ["--max-length", "64"])
    lengths = [(run.data.max_length, run.data.pack_length) for run in (run_of(*MODEL, *words) for words in given)]
    assert lengths == [(2048, 2048), (512, 512), (8192, 8192), (64, 2048)]


def test_a_step_has_a_pack_for_each_process_unless_said_otherwise() -> None:
    assert run_of(*MODEL, processes=4).train.global_batch_size == 4
    assert run_of(*MODEL, "--global-batch-size", "8", processes=4).train.global_batch_size == 8


def test_flags_win_over_the_file_and_leave_it_as_it_was() -> None:
    tree = {
        "model": {"config": "qwen3-tiny"},
        "data": {"train": "a", "max_length": 64},
        "train": {"epochs": 3, "lora": {"rank": 4}},
        "seed": 7,
    }
    before = json.dumps(tree)
    run = run_of("--total-step", "9", "--lora.alpha", "1", "--dataset", "b", tree=tree)
    assert (run.train.total_step, run.train.epochs, run.train.lora.rank, run.train.lora.alpha) == (9, None, 4, 1)
    assert (run.data.train[0].path, run.data.max_length, run.seed) == ("b", 64, 7)
    assert json.dumps(tree) == before


@pytest.mark.parametrize("name", shipped_names())
def test_a_recipe_of_the_pipeline_is_a_run_s_file(name: str) -> None:
    tree = read_tree(PROJECT / "pipelines" / "recipes" / f"{name}.yaml")
    run = whole_run(tree, name, 1)
    assert run.model.base == tree["model"]["base"] and run.train == TrainConfig.model_validate(tree["train"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("run.py", "lr = 1", r"run\.py: a configuration is data and never a program that runs; write the same fields as YAML"),
        ("run.yaml", "a: [", "Invalid YAML"),
        ("run.yaml", "- a", "must be a mapping, this file holds list"),
        ("run.yaml", "when: 2001-99-99", "Invalid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=f"--config .*{told}"):
        read_tree(tmp_path / name)


def test_an_unknown_field_is_told_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"run: train\.learning_rat: no such field.* Known there: .*\blr\b"):
        whole_run({"model": {"config": "x"}, "data": {"train": "a"}, "train": {"learning_rat": 1}}, "run", 1)
    with pytest.raises(RecipeError, match=r"lora\.alfa: no such field; did you mean alpha\?"):
        whole_run({"model": {"config": "x"}, "data": {"train": "a"}, "train": {"lora": {"alfa": 1}}}, "run", 1)


HELP = """
import sys, time
from xtuner_core.sft import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)), time.process_time())
"""


def test_help_answers_at_once_and_lists_every_flag() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=PROJECT, capture_output=True, text=True, check=True)
    *help_text, last = done.stdout.splitlines()
    found = re.fullmatch(r"\[\] ([\d.]+)", last)
    assert found and float(found[1]) < 1.0
    words = " ".join(" ".join(help_text).split())
    for flag in flags():
        assert f"--{flag.names[0]} " in words and f"(default: {flag.shown_default}) [{flag.dotted}]" in words
