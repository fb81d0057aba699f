"""Answers on the way: the model's own greedy answers, and not a trace of them in the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_core import trainer
from xtuner_core.checkpoint import store
from xtuner_core.config import SftConfig
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.parallel.mesh import World
from xtuner_core.samples import read_prompts
from xtuner_core.signals import StopRequest


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def reference_answer(model_dir: Path, weights: Path, question: str, tokens: int) -> str:
    """By transformers' own template and generation."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(store.load_whole(weights), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return tokenizer.decode([number for number in out if number not in ends])


@pytest.mark.parametrize("train", [{"method": "full"}, {"method": "lora", "lora": {"dropout": 0.2}, "dtype": "bf16"}])
def test_training_is_bit_for_bit_the_same_with_and_without(
    train: dict, world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    outcomes = []
    for samples in ({}, {"sample_prompts": ["What is 2+3?", "Hello"], "sample_interval": 1, "sample_tokens": 6}):
        work = tmp_path / str(len(outcomes))
        work.mkdir()
        trainer.train(sft_config(**train, **samples).model_copy(update={"work_dir": work}), world, stop)
        outcomes.append((store.load_whole(work / "final"), [row["total_loss"] for row in jsonl(work / "metrics.jsonl")]))
    (plain, losses), (sampled, losses_sampled) = outcomes
    assert losses == losses_sampled and plain.keys() == sampled.keys()
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)
    rows = jsonl(tmp_path / "1" / "samples.jsonl")
    assert [(row["step"], row["messages"][-1]["content"]) for row in rows] == [
        (step, question) for step in (1, 2, 3) for question in ("What is 2+3?", "Hello")
    ]
    assert not (tmp_path / "0" / "samples.jsonl").exists()


def test_answers_are_those_of_the_exported_model(
    world: World,
    stop: StopRequest,
    sft_config: Callable[..., SftConfig],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer.train(sft_config(total_step=12, sample_prompts="What is 2+3?", sample_tokens=9), world, stop)
    [row] = jsonl(tmp_path / "samples.jsonl")
    assert row["step"] == 12 and row["tokens"] == 9 and not row["ended"]
    assert row["answer"] == reference_answer(tiny_model_folder, tmp_path / "final", "What is 2+3?", 9)
    assert f"Sample step 12 'What is 2+3?' -> {row['answer']!r}" in capsys.readouterr().out


def test_prompts_from_files(sft_config: Callable[..., SftConfig], tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one\n\n two \n")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "unused"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps({"messages": chat[:2]}) + "\n")
    config = sft_config(sample_prompts=["zero.", str(tmp_path / "plain.txt"), str(tmp_path / "chat.jsonl")])
    prompts = read_prompts(config)
    assert prompts is not None
    assert [[message.content for message in asked] for asked in prompts.asked] == [["zero."], ["one"], ["two"], *[["Be brief.", "Hi"]] * 2]
    tokenizer = AutoTokenizer.from_pretrained(config.model_dir)
    asked = [[message.as_dict() for message in messages] for messages in prompts.asked]
    own = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]
    assert list(prompts.ids) == own


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("gone.txt", None, RecipeError, r"gone.txt: .*No such file.* A prompt that ends in .txt or .jsonl is a file"),
        ("bad.jsonl", '{"messages": ', DataError, r"bad.jsonl:1: not JSON.* Give OpenAI chat messages"),
        ("odd.jsonl", '[{"role": "user", "content": "?"}]\n["Hi"]', DataError, r"odd.jsonl:2: .* Give OpenAI chat messages"),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: str | None, kind: type[Exception], message: str, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=message):
        read_prompts(sft_config(sample_prompts=str(tmp_path / name)))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one_and_train_as_without(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    samples = {"sample_prompts": ["What is 2+3?"], "sample_interval": 2, "sample_tokens": 6}
    works = {name: tmp_path / name for name in ("plain", "sampled", "alone")}
    for name, work in works.items():
        work.mkdir()
        config = sft_config(total_step=3, global_batch_size=2, **({} if name == "plain" else samples)).model_copy(update={"work_dir": work})
        (work / "config.json").write_text(config.model_dump_json())
    script = Path(__file__).parent / "adapters" / "train_in_turn.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [works[name] / "config.json" for name in ("plain", "sampled")]
    environment = {**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {name: [row["total_loss"] for row in jsonl(works[name] / "metrics.jsonl")] for name in ("plain", "sampled")}
    assert losses["plain"] == losses["sampled"]
    trainer.train(SftConfig.model_validate_json((works["alone"] / "config.json").read_text()), world, stop)
    assert jsonl(works["sampled"] / "samples.jsonl") == jsonl(works["alone"] / "samples.jsonl")
    assert [row["step"] for row in jsonl(works["alone"] / "samples.jsonl")] == [2, 3]
