"""Stage train: what its record tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import pipeline, train
from pipelines.recipe import PROJECT, load_recipe
from pipelines.stage import Work
from xtuner_core.errors import Interrupted, RecipeError, UserError


def test_steps_that_were_left_out_are_counted_and_their_documents_named(
    tiny_model_folder: Path, tiny_data: Path, prepare_place: Callable[[], Work]
) -> None:
    place, lines = prepare_place(), []
    work = Work(
        {"base": tiny_model_folder.parent, "data": tiny_data}, place.payload, place.record, place.scratch, place.cache, lines.append
    )
    every_rise = ("train.skip_grad_norm_factor=1.000001", "train.skip_grad_norm_window=1", "train.max_skipped_steps=8")
    metrics = train.run(load_recipe("qwen3_tiny_full_openai", ("train.total_step=8", *every_rise)), work)
    rows = [json.loads(row) for row in (work.record / "metrics.jsonl").read_text().splitlines()]
    left_out, last = [], float("inf")
    for row in rows:
        if row["step"] > 1 and row["grad_norm"] > 1.000001 * last:
            left_out.append(row["step"])
        else:
            last = row["grad_norm"]
    assert (metrics["steps"], metrics["skipped_steps"]) == (8, len(left_out))
    told = [line for line in lines if "left out step" in line]
    assert left_out and [int(line.split("left out step ")[1].split(":")[0]) for line in told] == left_out
    assert all("Documents of the step: [" in line for line in told)


def test_what_was_watched_is_in_the_record_and_a_loss_that_is_not_finite_is_null(
    tiny_model_folder: Path, tiny_data: Path, prepare_place: Callable[[], Work]
) -> None:
    place = prepare_place()
    work = Work({"base": tiny_model_folder.parent, "data": tiny_data}, place.payload, place.record, place.scratch, place.cache, print)
    for service in ("wandb", "mlflow"):  # as an attempt before left them, or as they would be if these were installed
        (work.scratch / service).mkdir()
    (work.scratch / "mlflow" / "mlflow.db").write_bytes(b"runs")
    (work.scratch / "wandb" / "latest-run").symlink_to("gone")
    diverging = ("train.lr=1e18", "train.weight_decay=0", "train.skip_grad_norm_factor=2", "train.total_step=2")
    watched = ("train.trackers=tensorboard", "train.profile_step=1", 'train.sample_prompts=["Hi, you"]', "train.sample_tokens=2")
    metrics = train.run(load_recipe("qwen3_tiny_full_openai", (*diverging, *watched)), work)
    text = (work.record / "metrics.jsonl").read_text()
    rows = [json.loads(row, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for row in text.splitlines()]
    assert [row["total_loss"] is None for row in rows] == [False, True]
    assert metrics["first_loss"] == metrics["last_loss"] == rows[0]["total_loss"] and metrics["skipped_steps"] == 1
    assert list((work.record / "tensorboard").glob("events.*"))
    assert (work.record / "mlflow" / "mlflow.db").read_bytes() == b"runs" and (work.record / "wandb").is_dir()
    assert (work.record / "profile" / "step-1" / "rank-0" / "trace.json.gz").is_file()
    [sample] = [json.loads(row) for row in (work.record / "samples.jsonl").read_text().splitlines()]
    assert (sample["step"], sample["messages"], sample["tokens"]) == (2, [{"role": "user", "content": "Hi, you"}], 2)


def test_a_prompt_file_is_found_as_other_files_of_a_recipe() -> None:
    train_config = load_recipe("qwen3_tiny_full_openai", ('train.sample_prompts=["Hi.", "data/rows.jsonl"]',)).train
    assert train.with_places(train_config).sample_prompts == ("Hi.", str(PROJECT / "data" / "rows.jsonl"))


def test_a_tracker_is_looked_for_before_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="'tensorbord' is not one of the trackers: mlflow, tensorboard"):
        pipeline.check(load_recipe("qwen3_tiny_full_openai", ("train.trackers=tensorbord",)))
    monkeypatch.setattr("xtuner_core.trackers.wandb.PACKAGE", "nosuchpackage")
    with pytest.raises(RecipeError, match="wandb needs a package that is not installed: pip install nosuchpackage"):
        pipeline.check(load_recipe("qwen3_tiny_full_openai", ("train.trackers=wandb",)))


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [(1, "Signal 9 (SIGKILL) received by PID 7", Interrupted), (-9, "", Interrupted), (1, "IndexError: 5", UserError)],
)
def test_a_training_that_was_killed_is_to_be_run_again_and_one_that_broke_is_not(
    status: int, said: str, kind: type[UserError], tmp_path: Path
) -> None:
    (tmp_path / "train.log").write_text(f"Step 1/2\n{said}\n")
    told = train._failure(tmp_path / "outcome.json", status, tmp_path / "train.log", nodes=1)
    assert type(told) is kind and said in str(told)
    assert told.exit_code == (75 if kind is Interrupted else 70)
