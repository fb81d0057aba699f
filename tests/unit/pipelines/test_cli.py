"""The `xtuner` command as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts import Store
from pipelines.recipe import PROJECT, load_recipe, recipe_file, shipped_names
from pipelines.runner import run_until

TINY = "qwen3_tiny_full_openai"
DATA = "--set=data.train=data/openai_chats/heldout.jsonl"
Done = subprocess.CompletedProcess[str]


def xtuner(*arguments: str | Path, env: dict[str, str] | None = None, preexec: Callable[[], None] | None = None) -> Done:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}, preexec_fn=preexec
    )


def assert_told(done: Done, code: int, *parts: str) -> None:
    """One readable complaint on stderr, with the documented exit code."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert [part for part in parts if part not in done.stderr] == []


@pytest.fixture
def store(prepared_store: Store) -> Path:
    return prepared_store.root


def folder_of(store: Path, stage: str) -> Path:
    (folder,) = (store / stage).iterdir()
    return folder


# Help -------------------------------------------------------------------------------------------------------------------------------


def test_without_arguments_it_lists_every_command() -> None:
    done = xtuner()
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("list-cfg", "copy-cfg", "plan", "run", "prepare", "train", "convert", "eval", "chat", "preview", "verify", "env"):
        assert f"│ {command} " in done.stdout


@pytest.mark.parametrize("command", ["run", "env"])
def test_help_of_a_command(command: str) -> None:
    done = xtuner(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"xtuner {command}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nosuch"], "nosuch"),
        (["plan"], "--recipe"),
        (["plan", TINY, "--nosuch"], "--nosuch"),
        (["preview", TINY, "--count", "many"], "many"),
        (["copy-cfg", TINY], "--folder"),
        (["env", "nosuch"], "nosuch"),
    ],
)
def test_a_wrong_command_line_is_told(arguments: list[str], named: str) -> None:
    done = xtuner(*arguments)
    assert done.returncode == 78
    assert named in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


# Recipes ----------------------------------------------------------------------------------------------------------------------------


def test_list_cfg_names_and_describes_every_recipe() -> None:
    lines = xtuner("list-cfg").stdout.splitlines()
    assert lines[::2] == shipped_names()
    assert all(line.startswith("    ") and line.strip() for line in lines[1::2])


def test_list_cfg_with_a_pattern() -> None:
    assert xtuner("list-cfg", "-p", "tiny").stdout.splitlines()[::2] == [TINY]
    assert xtuner("list-cfg", "--pattern", "nosuch").stdout == ""


def test_copy_cfg_makes_a_recipe_of_your_own(tmp_path: Path) -> None:
    done = xtuner("copy-cfg", TINY, tmp_path / "new" / "folder")
    copy = tmp_path / "new" / "folder" / f"{TINY}_copy.yaml"
    assert (done.returncode, done.stdout) == (0, f"{copy}\n")
    assert copy.read_bytes() == recipe_file(TINY).read_bytes()
    copy.write_text(copy.read_text() + "\n# mine\n")
    assert_told(xtuner("copy-cfg", TINY, copy.parent), 78, str(copy), "exists already")
    assert copy.read_text().endswith("# mine\n")
    assert xtuner("plan", copy, "--store", tmp_path / "store").returncode == 0


def test_copy_cfg_of_an_unknown_recipe_and_into_a_file(tmp_path: Path) -> None:
    assert_told(xtuner("copy-cfg", "nosuch", tmp_path), 78, "'nosuch'", *shipped_names())
    blocked = tmp_path / "file"
    blocked.touch()
    assert_told(xtuner("copy-cfg", TINY, blocked), 74, str(blocked))


# One line, one code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "run", "prepare", "train", "convert", "eval", "chat", "preview"])
def test_every_command_tells_a_wrong_recipe_first(command: str, tmp_path: Path) -> None:
    unknown = xtuner(command, "nosuch", "--store", tmp_path / "store")
    assert_told(unknown, 78, "'nosuch'", *shipped_names())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_wrong_field_is_one_line(command: str, tmp_path: Path) -> None:
    field = xtuner(command, TINY, "--set", "train.learning_rate=1", "--store", tmp_path / "store")
    assert_told(field, 78, f"{TINY}.yaml: unknown field train.learning_rate; known there: ")
    assert len(field.stderr.splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_a_broken_recipe_file_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: [")
    assert_told(xtuner("plan", mine), 78, f"{mine}: not readable as YAML")


def test_plan_prints_one_line_a_stage_and_what_training_needs(store: Path) -> None:
    done = xtuner("plan", TINY, DATA, "--store", store)
    assert done.returncode == 0
    told = [line.split() for line in done.stdout.splitlines()]
    stages, forecast = told[:8], told[8:]
    assert [line[0] for line in stages] == ["base", "prepare", "train", "convert", "eval-base", "eval", "verdict", "chat"]
    assert [line[1] for line in stages] == ["cached", "cached", "will", "depends", "will", "depends", "depends", "depends"]
    assert [line[0] for line in forecast] == ["train", "convert", "eval-base", "eval", "chat", "all"]
    assert forecast[0][1:8] == ["0.1", "M", "parameters,", "0.1", "M", "trained,", "40"]


def test_a_cached_stage_is_found_from_any_folder_and_says_its_figures(store: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "pipelines.cli", "prepare", TINY, DATA, "--store", "store"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"[prepare] cached: {folder_of(store, 'prepare')}" in done.stdout
    assert "  accepted: 16\n" in done.stdout


def test_preview_shows_what_is_learned(store: Path) -> None:
    done = xtuner("preview", TINY, DATA, "-n", "2", "--store", store)
    assert done.returncode == 0
    assert done.stdout.count("<|im_start|>user\n") == 2
    assert done.stdout.count("<|im_start|>assistant\n⟦") == 2
    assert done.stdout.count("<|im_end|>⟧\n") == 2
    assert "[prepare] cached" in done.stderr


def test_preview_of_a_line_with_token_boundaries(store: Path) -> None:
    done = xtuner("preview", TINY, DATA, "--line", "heldout.jsonl:2", "--tokens", "--store", store)
    assert done.returncode == 0
    assert "/heldout.jsonl:2: " in done.stdout.splitlines()[0]
    assert "<|im_start|>│u│s│e│r│" in done.stdout
    for options, reason in ((("--line", "heldout.jsonl:999"), "the file has 16 lines"), (("--validation",), "set data.validation")):
        done = xtuner("preview", TINY, DATA, *options, "--store", store)
        assert (done.returncode, "Traceback" in done.stderr) == (78, False)
        assert reason in done.stderr.splitlines()[-1]


def test_a_reader_that_stops_reading_is_no_error(store: Path) -> None:
    command = f"{sys.executable} -m pipelines.cli preview {TINY} {DATA} -n 16 --store {store} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.startswith("document ")


@pytest.mark.slow
def test_bad_data_keeps_the_base(store: Path, tmp_path: Path) -> None:
    base = folder_of(store, "base")
    done = xtuner("prepare", TINY, "--set", "data.train=data/hostile/broken_json.jsonl", "--store", store)
    assert_told(done, 65, "data/hostile/broken_json.jsonl:", "data.max_rejected")
    missing = xtuner("prepare", TINY, "--set", "data.train=nosuch.jsonl", "--store", store)
    assert_told(missing, 65, "nosuch.jsonl: no such file")
    assert Store(store).find("base", base.name, full=True)
    assert len(list((store / "prepare").iterdir())) == 1


def test_verify_counts_what_is_whole_and_names_what_is_not(store: Path, tmp_path: Path) -> None:
    assert xtuner("verify", "--store", store).stdout == "2 artifacts are whole\n"
    file = folder_of(store, "prepare") / "payload" / "samples.jsonl"
    stamp = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    os.utime(file, ns=(stamp, stamp))
    done = xtuner("verify", "--store", store)
    assert_told(done, 65, f"{folder_of(store, 'prepare')}: payload/samples.jsonl: its bytes changed")
    assert done.stdout == "1 artifacts are whole\n"
    assert xtuner("verify", "--store", tmp_path / "nothing").stdout == "0 artifacts are whole\n"


def test_a_file_in_place_of_the_store_is_a_storage_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert_told(xtuner("prepare", TINY, "--store", blocked), 74, str(blocked))


@pytest.mark.slow
def test_no_room_on_the_disk_publishes_nothing_and_keeps_the_rest(store: Path) -> None:
    shutil.rmtree(store / "prepare")
    limit = 1024

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = xtuner("prepare", TINY, DATA, "--store", store, preexec=little_room)
    assert_told(done, 74, "prepare: ", f"Check space and permissions below {store}")
    assert len(done.stderr.splitlines()) == 1
    assert not (store / "prepare").exists()
    assert Store(store).find("base", folder_of(store, "base").name, full=True)
    run_until("prepare", load_recipe(TINY, [DATA.removeprefix("--set=")]), Store(store), print)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_ends_in_one_line_and_leaves_no_child(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a package index that never answers
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        env = {**os.environ, "PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "no_proxy": "*"}
        command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "prepare",
            TINY,
            "--set",
            "model.base=pypi:nothing==1.0",
            "--store",
            str(tmp_path),
        ]
        with subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert "fetching nothing==1.0" in process.stdout.readline()
            connection, _ = silent.accept()
            with connection:
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(number)
                _, told = process.communicate(timeout=30)
    assert process.returncode == 75
    assert told == "error: interrupted in base; finished stages are kept, run the same command again to continue.\n"
    assert children
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not (tmp_path / "base").exists()


# The store --------------------------------------------------------------------------------------------------------------------------


def test_cache_lists_pins_compares_backs_up_and_cleans(store: Path, tmp_path: Path) -> None:
    base, prepared = (folder_of(store, stage).name for stage in ("base", "prepare"))
    listed = xtuner("cache", "ls", "--store", store)
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:-1] if line.startswith("artifact")] == [
        ["artifact", f"prepare/{prepared}"], ["artifact", f"base/{base}"],
    ]  # fmt: skip
    assert xtuner("cache", "pin", base[:6], "--why", "for tests", "--store", store).stdout == f"base/{base} is pinned\n"
    assert xtuner("cache", "backup", tmp_path / "copy", "--home", tmp_path, "--store", store).stdout.startswith("2 artifacts are new")
    cleaned = xtuner("cache", "gc", "--budget", "1kB", "--store", store)
    assert (cleaned.returncode, (store / "prepare" / prepared).exists(), (store / "base" / base).exists()) == (0, False, True)
    assert "all that is left is needed" in cleaned.stdout
    assert "pinned: for tests" in xtuner("cache", "ls", "--json", "--store", store).stdout
    assert xtuner("verify", "--store", tmp_path / "copy" / "store").stdout == "2 artifacts are whole\n"
    same = xtuner("cache", "why", base, base, "--store", store)
    assert same.stdout == "their payloads are the same to the byte\n"
    assert_told(xtuner("cache", "verify", prepared, "--store", store), 78, "no artifact", "xtuner cache ls")
    assert_told(xtuner("cache", "gc", "--budget", "plenty", "--store", store), 78, "write 200GB")


def test_damage_that_only_a_full_check_finds_is_rebuilt_by_the_next_run(store: Path) -> None:
    file = folder_of(store, "prepare") / "payload" / "samples.jsonl"
    stamp, key = file.stat().st_mtime_ns, folder_of(store, "prepare").name
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    os.utime(file, ns=(stamp, stamp))
    recipe = load_recipe(TINY, [DATA.removeprefix("--set=")])
    assert run_until("prepare", recipe, Store(store), print).cached, "its size and time are as they were"
    assert_told(xtuner("cache", "verify", f"prepare/{key[:8]}", "--store", store), 65, "samples.jsonl: its bytes changed")
    assert not run_until("prepare", recipe, Store(store), print).cached
