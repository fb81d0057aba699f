"""The engine's own command from raw files to a trained model: it prepares, trains, continues, and refuses what does not belong together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from pipelines.recipe import PROJECT
from xtuner_core import preparation, sft
from xtuner_core.data.byte_tokenizer import CONTROLS
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.parallel import rendezvous
from xtuner_core.parallel.rendezvous import sharing

CHATS = PROJECT / "data" / "openai_chats"
BASICS = ("--model-cfg", "qwen3-tiny", "--lr", "5e-3", "--pack-max-length", "1024", "--global-batch-size", "2", "--dtype", "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of four steps."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copyfile(CHATS / "train.jsonl", place / "chats.jsonl")
    words = ("--dataset", str(place / "chats.jsonl"), "--work-dir", str(place / "work"))
    assert sft.main([*BASICS, *words, "--total-step", "4", "--checkpoint-interval", "2"]) == 0
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    return tmp_path


def command(place: Path, *more: str) -> int:
    return sft.main(
        [*BASICS, "--dataset", str(place / "chats.jsonl"), "--work-dir", str(place / "work"), "--checkpoint-interval", "2", *more]
    )


def rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def results(work: Path) -> dict[str, bytes]:
    """Every byte that a run leaves and the next must not touch."""
    files = [file for part in ("checkpoints", "final") for file in sorted((work / part).rglob("*")) if file.is_file()]
    return {str(file.relative_to(work)): file.read_bytes() for file in [*files, work / "run.json", work / "metrics.jsonl"] if file.exists()}


def test_start_goes_on_from_a_result_in_a_directory_of_its_own(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another result in the same place is another run; the same one elsewhere is the same."""
    finals = [shutil.copytree(place / "work" / "final", tmp_path_factory.mktemp("earlier") / "final") for _ in range(2)]
    model = str(next((place / "work" / "prepared").glob("model-*")))
    basics = ["--load-from", model, *BASICS[2:], "--dataset", str(place / "chats.jsonl"), "--work-dir", str(place / "next")]
    assert sft.main([*basics, "--total-step", "1", "--start", str(finals[0])]) == 0
    assert rows(place / "next")[0]["total_loss"] < rows(place / "work")[0]["total_loss"] - 0.3
    before = results(place / "next")
    assert sft.main([*basics, "--total-step", "1", "--start", str(finals[1])]) == 0
    assert results(place / "next") == before
    assert sft.main([*basics, "--total-step", "1"]) == 78
    assert "train.start" in json.loads((place / "next" / "outcome.json").read_text())["message"]
    assert sft.main([*basics, "--total-step", "1", "--start", str(place)]) == 65


def test_a_preset_learns_from_raw_files(trained: Path) -> None:
    losses = [row["total_loss"] for row in rows(trained / "work")]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    assert (trained / "work" / "final" / "checkpoint.json").is_file()
    (data,) = (trained / "work" / "prepared").glob("data-*")
    assert PackedDataset(data).description["accepted"] == 96 == len((CHATS / "train.jsonl").read_text().splitlines())
    assert not (trained / "work" / "outcome.json").exists()


def test_the_record_tells_the_runs(trained: Path) -> None:
    (exp,) = json.loads((trained / "work" / ".xtuner").read_text())["exps"]
    (run,) = exp["history"]
    assert (run["begin"], run["end"], run["comment"]) == (0, 4, "finished")
    assert [Path(path).name for path in exp["checkpoint_list"]] == ["step-2"]
    assert (exp["cur_step"], exp["cur_epoch"]) == (4, 0)
    assert exp["consumed_tokens"] == sum(row["text_tokens"] for row in rows(trained / "work"))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    assert head.returncode != 0 or len(run["git_info"]["commit"]) == 40


@pytest.mark.parametrize("rank", [0, 1])
def test_a_finished_run_has_nothing_to_do_and_says_so_once(
    rank: int, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = results(place / "work")
    monkeypatch.setenv("RANK", str(rank))
    assert command(place, "--total-step", "4") == 0
    assert ("nothing to do" in capfd.readouterr().out) == (rank == 0)
    assert results(place / "work") == copy


def test_more_steps_continue_from_the_checkpoint_and_what_changed_is_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(place, "--total-step", "5", "--lr-min", "1e-4") == 0
    told = capfd.readouterr().out
    assert "changed since the run began: train.total_step: 4 → 5" in told and "train.lr_min: 1e-06 → 0.0001" in told
    assert "resumed from step-2" in told and "tokenized" not in told
    assert [row["step"] for row in rows(place / "work")] == [1, 2, 3, 4, 3, 4, 5]
    history = json.loads((place / "work" / ".xtuner").read_text())["exps"][-1]["history"]
    assert [(run["begin"], run["end"]) for run in history[-1:]] == [(2, 5)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", "3"), "seed: 42 → 3"),
        (("--method", "lora"), 'train.method: "full" → "lora"'),
        (("--model-cfg", "qwen3-moe-tiny"), "model.config.json"),
        (("--global-batch-size", "4"), "train.global_batch_size: 2 → 4"),
        (("--pack-max-length", "2048"), "data.pack_length: 1024 → 2048"),
        (("--chat-template", "phi"), 'template: "chatml" → "phi"'),
    ],
)
def test_a_checkpoint_is_not_continued_as_another_run(
    words: tuple[str, ...], told: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = results(place / "work")
    assert command(place, "--total-step", "6", *words) == 78
    message = capfd.readouterr().err
    assert told in message and "--no-resume" in message and "Traceback" not in message
    assert results(place / "work") == copy


def test_changed_data_is_told_and_nothing_overwritten(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(place, "--total-step", "5") == 0  # here, where the file will change
    copy = results(place / "work")
    with open(place / "chats.jsonl", "a") as file:
        file.write('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n')
    assert command(place, "--total-step", "6") == 65
    assert f"the data changed since the checkpoint: {place / 'chats.jsonl'} has other bytes" in capfd.readouterr().err
    assert results(place / "work") == copy
    assert json.loads((place / "work" / "outcome.json").read_text())["code"] == 65


def test_the_same_files_used_otherwise_are_another_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((place / "work" / "run.json").read_text())
    facts["data"]["files"][0]["ratio"] = 0.3
    (place / "work" / "run.json").write_text(json.dumps(facts))
    assert command(place, "--total-step", "6") == 78
    assert "data.files" in capfd.readouterr().err


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{}"), lambda file: file.write_text("[")])
def test_without_its_facts_a_checkpoint_is_not_continued(
    damage: Callable[[Path], Any], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(place / "work" / "run.json")
    copy = results(place / "work")
    assert command(place, "--total-step", "6", "--seed", "3") == 65
    assert "nobody can tell what the checkpoints belong to" in capfd.readouterr().err
    assert results(place / "work") == copy


def test_fewer_steps_than_the_checkpoint_has_are_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    final = (place / "work" / "final" / "checkpoint.json").read_bytes()
    assert command(place, "--total-step", "1") == 78
    assert "is at step 2, and 1 are asked for" in capfd.readouterr().err
    assert (place / "work" / "final" / "checkpoint.json").read_bytes() == final


def test_the_same_data_may_lie_elsewhere(place: Path) -> None:
    (place / "chats.jsonl").rename(place / "moved.jsonl")
    assert command(place, "--total-step", "4", "--dataset", str(place / "moved.jsonl")) == 0


def test_starting_over_keeps_what_was_there(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = results(place / "work")
    assert command(place, "--total-step", "1", "--seed", "3", "--no-resume") == 0
    (aside,) = (place / "work").glob("previous-*")
    assert results(aside) == copy and str(aside) in capfd.readouterr().out
    assert [row["step"] for row in rows(place / "work")] == [1]
    before, now = json.loads((place / "work" / ".xtuner").read_text())["exps"]
    assert (before["exp_dir"], now["exp_dir"]) == (str(aside), str(place / "work"))
    assert before["checkpoint_list"] == [str(aside / "checkpoints" / "step-2")] and Path(before["checkpoint_list"][0]).is_dir()


def test_starting_over_with_a_mistake_moves_nothing(place: Path) -> None:
    copy = results(place / "work")
    assert command(place, "--no-resume", "--dataset", str(place / "none.jsonl")) == 65
    assert results(place / "work") == copy


def test_two_runs_do_not_share_a_directory(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = results(place / "work")
    with FileLock(place / "work" / ".lock"):
        assert command(place, "--total-step", "6") == 78
    assert "another run is at work there" in capfd.readouterr().err
    assert results(place / "work") == copy and not (place / "work" / "outcome.json").exists()


def test_a_signal_while_preparing_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = preparation.find_model

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return find(*arguments)

    monkeypatch.setattr(preparation, "find_model", signalled)
    words = [*BASICS, "--dataset", str(CHATS / "heldout.jsonl"), "--work-dir", str(tmp_path), "--total-step", "1"]
    assert sft.main(words) == 75
    assert "stopped while the run was prepared; the same command continues" in capfd.readouterr().err
    monkeypatch.undo()
    assert sft.main(words) == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--model-cfg", "model.py"), 78, "a configuration is data and never a program that runs; give a preset (gpt-oss-20b, "),
        (("--model-cfg", "qwen9"), 78, "no such file, and the presets are gpt-oss-20b, "),
        (("--load-from", "{place}/none"), 78, "none: no such folder"),
        (("--load-from", "{place}/cache"), 78, "the root of a hub cache; name the snapshot in it: {place}/cache/snapshots/1"),
        (("--load-from", "{place}/cache/snapshots/1"), 78, "not a complete model folder: tokenizer.json, model.safetensors missing"),
        (
            ("--model-cfg", "{place}/small.json", "--tokenizer-path", "{tiny}"),
            78,
            "the tokenizer has 261 ids (up to 260), the model's vocab_size is 100",
        ),
        (("--model-cfg", "{place}/strange.json"), 78, "transformers cannot build such a model"),
        (("--model-cfg", "qwen3-tiny", "--method", "magic"), 78, "'magic' is not one of the adapters: full, lora"),
        (("--model-cfg", "qwen3-tiny", "--optim", "magic"), 78, "'magic' is not one of the optimizers: adamw"),
        (("--model-cfg", "qwen3-tiny", "--chat-template", "magic"), 78, "'magic' is not one of the templates: chatml"),
        (("--model-cfg", "qwen3-tiny", "--dataset", "{place}/none"), 65, "none: no such file"),
        (("--model-cfg", "qwen3-tiny", "--dataset", "{hostile}"), 65, "broken_json.jsonl:2"),
    ],
)
def test_a_wrong_model_or_file_is_told_before_anything_trains(
    words: tuple[str, ...], code: int, told: str, tmp_path: Path, tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    (tmp_path / "cache" / "snapshots" / "1").mkdir(parents=True)
    for file, content in (
        ("cache/snapshots/1/config.json", config),
        ("small.json", {**config, "vocab_size": 100}),
        ("strange.json", {"model_type": "x"}),
    ):
        (tmp_path / file).write_text(json.dumps(content))
    names = {"place": tmp_path, "tiny": tiny_model_folder, "hostile": PROJECT / "data" / "hostile" / "broken_json.jsonl"}
    given = [word.format(**names) for word in words]
    assert sft.main(["--dataset", str(CHATS / "heldout.jsonl"), "--work-dir", str(tmp_path / "work"), "--total-step", "1", *given]) == code
    message = capfd.readouterr().err
    assert told.format(**names) in message and "Traceback" not in message
    assert not (tmp_path / "work" / "metrics.jsonl").exists()


def test_a_folder_s_weights_template_and_tokenizer_are_used(
    tiny_model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--load-from", str(tiny_model_folder), "--dataset", str(CHATS / "*.jsonl"), "--work-dir", str(tmp_path), "--total-step", "1"]
    assert sft.main([*words, "--method", "lora"]) == 0
    assert "template chatml" in capfd.readouterr().out
    assert not list((tmp_path / "prepared").glob("model-*")), "nothing is copied"
    facts = json.loads((tmp_path / "run.json").read_text())
    assert [Path(one["file"]).name for one in facts["data"]["files"]] == ["heldout.jsonl", "train.jsonl"]


@pytest.mark.parametrize("template", ["qwen3", "llama3", "internlm2", "gpt-oss", "deepseek-v3", "phi", "gemma", "smollm2"])
def test_the_byte_tokenizer_speaks_any_template_within_a_small_vocabulary(template: str, tmp_path: Path) -> None:
    from xtuner_core.data.render import control_tokens, find_template
    from xtuner_core.data.tokenize import load_tokenizer
    from xtuner_core.models.source import find_model
    from xtuner_core.run_config import ModelChoice

    name = template.replace("-", "_")
    folders = find_model(ModelChoice(config="qwen3-tiny", template=name), 0, tmp_path, print)
    tokenizer = load_tokenizer(folders.tokenizer)
    assert list(tokenizer.control) == [*CONTROLS[:3], *control_tokens(name)] and tokenizer.vocab_size <= 264
    stops = json.loads((folders.model / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.control[find_template(name).STOP] in stops


def test_prepared_data_as_the_pipeline_gives_it_takes_flags_of_training_only(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"model_dir": str(tiny_model_folder), "data_dir": str(tiny_data), "work_dir": str(tmp_path / "work"), "train": {"epochs": 1}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    found = sft.asked(sft.parse(["--config", str(file), "--total-step", "2", "--seed", "5"]))
    assert isinstance(found, sft.SftConfig) and (found.train.total_step, found.train.epochs, found.seed) == (2, None, 5)
    assert sft.main(["--config", str(file), "--dataset", "x.jsonl"]) == 78
    assert "data.train cannot be changed any more" in capfd.readouterr().err


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xtuner_core.sft"]


@pytest.mark.slow
def test_two_processes_train_the_same_and_prepare_once(trained: Path, tmp_path: Path) -> None:
    words = ["--dataset", str(trained / "chats.jsonl"), "--work-dir", str(tmp_path), "--total-step", "4"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *BASICS, *words], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokenized 1 of 1") == 1
    expected = [row["total_loss"] for row in rows(trained / "work")]
    assert [row["total_loss"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-4)


def test_a_rank_that_waits_for_the_first_ends_when_the_launcher_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosted_store() as port:
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(rendezvous, "time", SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as ended:
            sft.main([*BASICS, "--dataset", str(CHATS / "heldout.jsonl"), "--work-dir", str(tmp_path)])
    assert ended.value.code == 75 and not list(tmp_path.iterdir())


def test_what_rank_zero_makes_every_rank_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make() -> str:
        time.sleep(0.3)
        made.append("a run")
        return made[0]

    def take(rank: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        share = sharing()
        started.release()
        return share(make)

    started = threading.Semaphore(0)
    with hosted_store() as port, ThreadPoolExecutor(3) as ranks:
        for name, value in {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        taken = []
        for rank in (2, 1, 0):
            taken.append(ranks.submit(take, rank))
            assert started.acquire(timeout=20)
        assert [one.result(timeout=30) for one in taken] == ["a run"] * 3
    assert made == ["a run"]


@contextmanager
def hosted_store() -> Iterator[int]:
    """A store such as torchrun hosts; gives its port."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
