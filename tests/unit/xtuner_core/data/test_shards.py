"""The cache of tokenized files: what is made again and what is not, whatever is damaged, killed, or done by two runs at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from pipelines import prepare
from pipelines.recipe import PROJECT, load_recipe
from xtuner_core.data import shards
from xtuner_core.data.dataset import Documents
from xtuner_core.data.prepare import KEPT_SAMPLES
from xtuner_core.errors import DataError, Interrupted

TINY = "qwen3_tiny_full_openai"


def chats(file: Path, *answers: str) -> Path:
    rows = [json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]) for answer in answers]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def many(file: Path, count: int = 200) -> Path:
    return chats(file, *(f"{file.stem} {number} " + "words " * 20 for number in range(count)))


@dataclass
class Cache:
    """A cache folder and a model; counts what each recipe makes it tokenize."""

    folder: Path
    model: Path
    told: list[str] = field(default_factory=list)

    def jobs(self, files: list[Path], *overrides: str) -> list[shards.Job]:
        recipe = load_recipe(TINY, [f"data.train=[{','.join(map(str, files))}]", *overrides])
        return prepare.plan(recipe, self.model, self.told.append).jobs

    def fill(self, files: list[Path], *overrides: str, processes: int = 1) -> int:
        return shards.tokenize(self.jobs(files, *overrides), self.folder, processes, self.told.append)

    def shard(self, file: Path) -> Path:
        return self.folder / self.jobs([file])[0].key

    def leftovers(self) -> list[Path]:
        return list((self.folder / ".work").glob("*"))


@pytest.fixture
def cache(tmp_path: Path, tiny_model_folder: Path) -> Cache:
    return Cache(tmp_path / "cache", tiny_model_folder)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes have several parts, done by real worker processes."""
    monkeypatch.setattr(shards, "PART_BYTES", 4096)


# What is tokenized again ------------------------------------------------------------------------------------------------------------


def test_adding_a_file_tokenizes_that_file_only(cache: Cache, tmp_path: Path) -> None:
    one, two = chats(tmp_path / "one.jsonl", "a"), chats(tmp_path / "two.jsonl", "b")
    assert [cache.fill([one]), cache.fill([one]), cache.fill([two, one]), cache.fill([one, two])] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "override",
    ["data.pack_length=4096", "data.packing=none", "data.order=length_grouped", "seed=7", "data.validation=0.5", "data.workers=3",
     "data.max_rejected=0.5", "train.epochs=2"],
)  # fmt: skip
def test_what_only_packs_again(cache: Cache, tmp_path: Path, override: str) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    assert [cache.fill([file]), cache.fill([file], override)] == [1, 0]


def test_a_ratio_only_packs_again(cache: Cache, tmp_path: Path) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    assert [cache.fill([file]), cache.fill([file], f"data.train={{path: {file}, sample_ratio: 3}}")] == [1, 0]


@pytest.mark.parametrize("override", ["data.max_length=512", "data.too_long=drop", "data.loss=last", "data.thinking=drop"])
def test_what_tokenizes_again(cache: Cache, tmp_path: Path, override: str) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    assert [cache.fill([file]), cache.fill([file], override), cache.fill([file])] == [1, 1, 0]


@pytest.mark.parametrize("changed", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_tokenizes_again(cache: Cache, tmp_path: Path, changed: str) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    assert cache.fill([file]) == 1
    other = tmp_path / "model"
    shutil.copytree(cache.model, other)
    with open(other / changed, "a", encoding="utf-8") as stream:
        stream.write("\n" if changed.endswith("json") else "{# another #}")
    assert Cache(cache.folder, other).fill([file]) == 1


def test_another_version_of_the_code_tokenizes_again(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner_core.data import shard

    file = chats(tmp_path / "one.jsonl", "a")
    assert cache.fill([file]) == 1
    monkeypatch.setattr(shard, "VERSION", shard.VERSION + 1)
    assert cache.fill([file]) == 1


def test_a_moved_file_and_its_copy_are_known(cache: Cache, tmp_path: Path) -> None:
    file = chats(tmp_path / "one.jsonl", "a", "b")
    assert cache.fill([file]) == 1
    moved, copy = tmp_path / "sub" / "moved.jsonl", tmp_path / "copy.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(file, copy)
    file.rename(moved)
    assert cache.fill([moved, copy]) == 0
    assert all(str(tmp_path) not in text.read_text() for text in cache.shard(copy).glob("*.json*"))


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl", ".jsonl"), ("a.b.JSON", ".json"), ("a.v2.csv.gz", ".csv.gz"), ("a", "")])
def test_the_kind_is_part_of_the_key(name: str, kind: str) -> None:
    assert shards.kind_of(Path("folder.d") / name) == kind


# What is in the cache is checked ----------------------------------------------------------------------------------------------------


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: _flip(shard / "ids.bin"),
        lambda shard: os.truncate(shard / "offsets.npy", 8),
        lambda shard: (shard / "loss.npy").unlink(),
        lambda shard: (shard / "more.npy").write_bytes(b""),
        lambda shard: (shard / shards.SEAL).write_text("{"),
        lambda shard: (shard / shards.SEAL).unlink(),
        lambda shard: [file.unlink() for file in shard.iterdir()],
    ],
)
def test_a_damaged_shard_is_made_again(cache: Cache, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    files = [chats(tmp_path / f"{name}.jsonl", name, "more") for name in ("one", "two")]
    cache.fill(files)
    shard = cache.shard(files[0])
    before = {file.name: file.read_bytes() for file in shard.iterdir()}
    damage(shard)
    assert [cache.fill(files), cache.fill(files)] == [1, 0]
    assert {file.name: file.read_bytes() for file in shard.iterdir()} == before
    assert any("one.jsonl: its shard" in line and "damaged" in line for line in cache.told)


def test_linked_files_outlive_the_cache_and_its_repair(cache: Cache, tmp_path: Path) -> None:
    file = chats(tmp_path / "one.jsonl", "a", "b")
    cache.fill([file])
    (job,) = cache.jobs([file])
    shards.link(cache.folder, job, tmp_path / "linked")
    ids = (tmp_path / "linked" / "ids.bin").read_bytes()
    assert (tmp_path / "linked" / "ids.bin").stat().st_nlink == 2
    (cache.shard(file) / "lines.npy").unlink()
    cache.fill([file])
    assert not os.path.samefile(cache.shard(file) / "ids.bin", tmp_path / "linked" / "ids.bin"), "made anew, not written through"
    shutil.rmtree(cache.folder)
    assert (tmp_path / "linked" / "ids.bin").read_bytes() == ids
    assert not (tmp_path / "linked" / shards.SEAL).exists()


def test_where_links_are_refused_files_are_copied(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    file = chats(tmp_path / "one.jsonl", "a")
    cache.fill([file])
    monkeypatch.setattr(os, "link", refuse)
    shards.link(cache.folder, cache.jobs([file])[0], tmp_path / "linked")
    assert (tmp_path / "linked" / "ids.bin").read_bytes() == (cache.shard(file) / "ids.bin").read_bytes()


def test_a_file_that_changes_meanwhile_never_gets_the_old_name(cache: Cache, tmp_path: Path) -> None:
    file = chats(tmp_path / "one.jsonl", "a")
    jobs = cache.jobs([file])
    chats(file, "b")
    with pytest.raises(DataError, match=r"one\.jsonl: changed while it was read"):
        shards.tokenize(jobs, cache.folder, 1, print)
    assert not (cache.folder / jobs[0].key).exists()
    assert cache.leftovers() == []


# Workers ----------------------------------------------------------------------------------------------------------------------------


def contents(shard: Path) -> dict[str, bytes]:
    """Every file of a shard; of the samples those that are used."""
    found = {file.name: file.read_bytes() for file in shard.iterdir() if file.name != shards.SEAL}
    return found | {"samples.jsonl": b"\n".join(found["samples.jsonl"].splitlines()[:KEPT_SAMPLES])}


@pytest.mark.usefixtures("small_parts")
def test_parts_done_by_processes_are_the_whole_file(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [many(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    with open(files[0], "a", encoding="utf-8") as stream:
        stream.write("rubbish\n\n" + chats(tmp_path / "last.jsonl", "last").read_text())
    assert cache.fill(files, processes=2) == 2
    alone = Cache(tmp_path / "alone", cache.model)
    monkeypatch.setattr(shards, "PART_BYTES", 1 << 30)
    assert alone.fill(files) == 2
    for file in files:
        assert contents(cache.shard(file)) == contents(alone.shard(file))
    documents = Documents(cache.shard(files[0]))
    assert len(documents) == 201
    (rejected,) = map(json.loads, (cache.shard(files[0]) / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["byte_offset"]) == (201, files[0].read_bytes().index(b"rubbish"))
    assert cache.leftovers() == [] and _workers() == []


HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "prefect.server", "-m prefect ", "-m flows.watch")


def _workers() -> list[psutil.Process]:
    """Our living children, without Python's own helpers of spawned processes and other tests' servers, which live as long as this one."""
    return [one for one in psutil.Process().children(recursive=True) if _works(one)]


def _works(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and not any(helper in " ".join(process.cmdline()) for helper in HELPERS)
    except psutil.Error:  # it ended while we looked
        return False


@pytest.mark.usefixtures("small_parts")
def test_a_mistake_in_one_file_stops_all_and_keeps_what_is_finished(cache: Cache, tmp_path: Path) -> None:
    good, bad = many(tmp_path / "good.jsonl"), tmp_path / "bad.parquet"
    bad.write_bytes(b"no parquet")
    jobs = cache.jobs([good, bad], "data.format=openai")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        shards.tokenize(jobs, cache.folder, 2, print)
    assert cache.leftovers() == [] and _workers() == []
    assert cache.fill([good]) in (0, 1)


RUN = """
import sys
from pathlib import Path
from pipelines import prepare
from pipelines.recipe import load_recipe
from xtuner_core.data import shards

if __name__ == "__main__":
    files, cache, model = sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3])
    shards.PART_BYTES = int(sys.argv[4])
    recipe = load_recipe("qwen3_tiny_full_openai", [f"data.train=[{','.join(files)}]"])
    jobs = prepare.plan(recipe, model, print).jobs
    print("ready", flush=True)
    try:
        print("made", shards.tokenize(jobs, cache, 2, print), flush=True)
    except KeyboardInterrupt:
        sys.exit(75)
"""


@pytest.fixture
def other_run(tmp_path: Path, cache: Cache) -> Callable[[list[Path], int], subprocess.Popen[str]]:
    """Another program that tokenizes files into the same cache."""
    script = tmp_path / "run.py"
    script.write_text(RUN)

    def start(files: list[Path], part_bytes: int = 4096) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), ",".join(map(str, files)), str(cache.folder), str(cache.model), str(part_bytes)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    return start


def test_two_runs_share_the_work_and_corrupt_nothing(cache: Cache, tmp_path: Path, other_run: Callable[..., subprocess.Popen[str]]) -> None:
    files = [many(tmp_path / f"{number}.jsonl", 50) for number in range(12)]
    runs = [other_run(files), other_run(list(reversed(files)))]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert cache.fill(files) == 0, "whole, every byte of them"
    assert [len(Documents(cache.shard(file))) for file in files] == [50] * 12
    assert cache.leftovers() == []


def test_a_second_run_waits_for_the_first_one_s_shard(
    cache: Cache, tmp_path: Path, other_run: Callable[..., subprocess.Popen[str]]
) -> None:
    files = [chats(tmp_path / f"{name}.jsonl", name) for name in ("one", "two")]
    key = cache.jobs(files[:1])[0].key
    (cache.folder / ".locks").mkdir(parents=True)
    with FileLock(cache.folder / ".locks" / key):
        run = other_run(files)
        _until(lambda: cache.shard(files[1]).exists())  # the other file is not held up
        time.sleep(0.5)
        assert run.poll() is None and not cache.shard(files[0]).exists()
    assert "made 2" in run.communicate(timeout=60)[0]


def _until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _descendants(run: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_killed_run_leaves_no_process_and_no_shard_that_is_used(
    cache: Cache, tmp_path: Path, other_run: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    file = many(tmp_path / "one.jsonl", 20_000)
    run = other_run([file], 1 << 16)
    _until(lambda: list((cache.folder / ".work").glob("*/00000[2-9]")))
    children = _descendants(run)
    assert len(children) >= 2
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does: to all of them
    else:
        run.send_signal(number)
    _, told = run.communicate(timeout=60)
    _until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not cache.shard(file).exists()
    if number == signal.SIGINT:
        assert (run.returncode, told, cache.leftovers()) == (75, "", [])
    assert cache.fill([file]) == 1, "nothing half done is used"
    assert len(Documents(cache.shard(file))) == 20_000
    assert cache.leftovers() == [], "what the killed run left is swept"


def test_a_killed_worker_is_told_and_leaves_nothing(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", 1 << 16)
    file = many(tmp_path / "one.jsonl", 20_000)

    def killer(count: int) -> None:
        for worker in _workers()[:1]:
            worker.kill()

    monkeypatch.setattr(shards, "progress", _calls(killer))
    with pytest.raises(Interrupted, match=r"was killed.*data\.workers=1"):
        cache.fill([file], processes=2)
    assert cache.leftovers() == [] and _workers() == []
    assert not cache.shard(file).exists()


def _calls(advance: Callable[[int], None]) -> Callable[..., object]:
    from contextlib import nullcontext

    return lambda *_: nullcontext(advance)
