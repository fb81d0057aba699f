"""What became of a line, compared with what the loader really deals to the ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import prepare
from pipelines.artifacts import Artifact, Store
from pipelines.cli import main
from pipelines.lineage import Chain, trace_back
from pipelines.pipeline import Node
from pipelines.recipe import Recipe, load_recipe
from pipelines.runner import run_node
from pipelines.stage import Metrics, Stage, Work
from pipelines.trace import told, trainings
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import load_step
from xtuner_core.errors import RecipeError

STEPS, SIZE = 7, 4


def chat(text: str, answer: str = "Yes.") -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]})


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats; line 3 is broken, 5 blank, 7 too long, 9 as 8."""
    special = {3: "{", 5: "", 7: chat("long " * 400), 9: chat("question 8")}
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(special.get(number, chat(f"question {number}")) + "\n" for number in range(1, 41)))
    return file


def trained(store: Store, recipe: Recipe, base: Artifact, train: dict[str, Any], metrics: Metrics) -> Artifact:
    """The prepared data of the recipe, a training of it that trains nothing, and its export."""
    made = {"base": base}
    made["prepare"] = run_node(Node("prepare", prepare.STAGE, {"base": "base"}), recipe, store, made, print).artifact

    def write(recipe: Recipe, work: Work) -> Metrics:
        (work.payload / "model").mkdir()
        (work.payload / "model" / "weights.bin").write_text(str(train))
        return metrics

    stage = Stage("train", 1, write, lambda recipe: {"seed": recipe.seed, "train": train})
    made["train"] = store.produce(stage, recipe, {"base": made["base"], "data": made["prepare"]}, print).artifact
    stage = Stage("convert", 1, write, lambda recipe: train)
    return store.produce(stage, recipe, {"checkpoint": made["train"]}, print).artifact


@pytest.fixture(scope="module")
def chain(lines: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    store = Store(tmp_path_factory.mktemp("trace") / "store")
    changes = [f"data.train={lines}", "data.validation=0.2", "data.max_rejected=0.5", "data.too_long=drop", "data.pack_length=100"]
    recipe = load_recipe("qwen3_tiny_full_openai", [*changes, "data.max_length=100"])
    model = trained(store, recipe, Artifact(tiny_model_folder.parents[1]), {"global_batch_size": SIZE}, {"steps": STEPS})
    return trace_back(store, str(model.path))


def answer(chain: Chain, place: object, line: int) -> str:
    return "\n".join(told(chain, f"{place}:{line}"))


def dealt(chain: Chain, world: int) -> dict[int, set[int]]:
    """Document → the steps, from 1, in which a rank's loader brings it."""
    (training,) = trainings(chain)
    dataset = PackedDataset(training.prepared.payload)
    steps: dict[int, set[int]] = defaultdict(set)
    for step in range(STEPS):
        for rank in range(world):
            for batch in load_step(dataset, step, SIZE, 42, rank, world):
                for document in batch.documents:
                    steps[document].add(step + 1)
    return steps


@pytest.mark.parametrize("world", [1, 2])
def test_every_document_s_steps_are_those_in_which_the_loader_deals_it(chain: Chain, world: int) -> None:
    (training,) = trainings(chain)
    expected = dealt(chain, world)
    assert SIZE * STEPS / 3 < len(PackedDataset(training.prepared.payload)) < SIZE * STEPS, "about two epochs, or it shows little"
    for number in range(training.prepared.starts[-1]):
        assert training.steps_of(number) == sorted(expected[number])
    assert {len(steps) for steps in expected.values()} != {1}


def test_every_line_is_accounted_for(chain: Chain, lines: Path) -> None:
    (training,) = trainings(chain)
    numbers = np.asarray(training.prepared.lines[0])
    expected = dealt(chain, 1)
    for document, line in enumerate(numbers.tolist()):
        said = answer(chain, lines, line)
        if training.prepared.splits[document] == 2:
            assert "not trained on: kept back for the validation loss, validation pack" in said
        elif expected[document]:
            steps = ", ".join(map(str, sorted(expected[document])))
            assert f"trained on in pack {training.packs_of(document)[0]} at step {steps} of {STEPS}" in said
        else:
            assert "was not yet due" in said
    assert "rejected, " in answer(chain, lines, 3)
    assert "it is blank" in answer(chain, lines, 5)
    assert "dropped as too long" in answer(chain, lines, 7)
    assert "the file has 40 lines" in answer(chain, lines, 41)
    assert "chats.jsonl:9 (" in answer(chain, lines, 8)
    assert "chats.jsonl:8 (" in answer(chain, lines, 9)
    assert "the same text" not in answer(chain, lines, 10)


def test_a_result_from_the_best_step_knows_only_the_steps_up_to_it(chain: Chain, lines: Path) -> None:
    (training,) = trainings(chain)
    document, steps = next((document, steps) for document, steps in dealt(chain, 1).items() if max(steps) > 2)
    training.step.manifest["metrics"]["best_step"] = 2  # pyright: ignore[reportIndexIssue]
    try:
        assert training.steps_of(document) == [step for step in sorted(steps) if step <= 2]
    finally:
        del training.step.manifest["metrics"]["best_step"]  # pyright: ignore[reportIndexIssue]


def test_a_file_is_known_by_its_bytes_else_by_its_name(chain: Chain, lines: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed.jsonl"
    copy.write_bytes(lines.read_bytes())
    assert answer(chain, copy, 1) == answer(chain, lines, 1)
    assert "no such file is here now" in answer(chain, "chats.jsonl", 1)
    other = tmp_path / "chats.jsonl"
    other.write_text(chat("something else"))
    assert "not in this model" in answer(chain, other, 1)
    missing = answer(chain, "nosuch.jsonl", 1)
    assert "not in this model" in missing and "its digest is unknown" in missing


@pytest.mark.parametrize("place", ["chats.jsonl", ":3", "chats.jsonl:three", "chats.jsonl:-1"])
def test_what_is_no_line_is_told(chain: Chain, place: str) -> None:
    with pytest.raises(RecipeError, match="write FILE:LINE"):
        list(told(chain, place))


def test_the_command(chain: Chain, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = chain.store.root / chain.model["stage"] / chain.model["key"]
    assert main(["trace", str(model), "--sample", f"{lines}:1"]) == 0
    assert capsys.readouterr().out.startswith("train/")
