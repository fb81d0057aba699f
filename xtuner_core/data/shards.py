"""Tokenized input files, kept for every later run: one folder for each (bytes of the file, encoding, tokenizer), whole or absent.

CACHE/<key>/          a shard (layout: xtuner_core/data/shard.py), and seal.json: size and sha256 of each of its files
CACHE/.work/<key>-*/  a shard that is being made, or was when its maker died
CACHE/.locks/<key>    held by its maker; the kernel's lock (flock), so it ends with its holder, however that dies
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from xtuner_core.digest import key_of, library_version, sha256
from xtuner_core.durable import remove
from xtuner_core.errors import DataError, Interrupted
from xtuner_core.progress import Advance, Log, progress

if TYPE_CHECKING:
    from filelock import FileLock

    from xtuner_core.data.shard import Encoding, Tally

SEAL = "seal.json"
PART_BYTES = 8 * 2**20
"""A worker's portion of a file."""
FILES_AT_ONCE = 64
"""Each has a lock open; the usual limit is 1024 open files."""
POLL_SECONDS = 0.2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_LIBRARIES = ("tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Job:
    """A file to tokenize, with everything that decides the result."""

    file: Path
    digest: str
    """sha256 of the file's bytes."""
    model_dir: Path
    encoding: Encoding
    key: str


def make_jobs(files: Sequence[Path], encodings: Sequence[Encoding], model_dir: Path) -> list[Job]:
    """One job for each file. Its key knows the file's bytes and kind, but not its name or place."""
    model = {name: sha256(model_dir / name) for name in _TOKENIZER_FILES if (model_dir / name).is_file()}
    return [_job(file, encoding, model_dir, model) for file, encoding in zip(files, encodings, strict=True)]


def _job(file: Path, encoding: Encoding, model_dir: Path, model: dict[str, str]) -> Job:
    from xtuner_core import registry
    from xtuner_core.data import formats, shard, templates

    words = [registry.find(formats, encoding.format)]
    words += [registry.find(templates, encoding.template)] if encoding.template != templates.OWN else []
    digest = sha256(file)
    ingredients = {
        "version": shard.VERSION,
        "file": digest,
        "kind": kind_of(file),
        "encoding": asdict(encoding),
        "code": [sha256(file) for word in words for file in _code(Path(str(word.__file__)))],
        "model": model,
        "libraries": {name: library_version(name) for name in _LIBRARIES},
    }
    return Job(file, digest, model_dir, encoding, key_of(ingredients))


def _code(module: Path) -> list[Path]:
    """A word's module and what the words of its folder share."""
    return [module, *sorted(module.parent.glob("_*.py"))]


def kind_of(file: Path) -> str:
    """What decides how its bytes are read: the endings of the name, as in `.jsonl` or `.csv.gz`."""
    endings = [ending.lower() for ending in file.suffixes]
    return "".join(endings[-2:] if endings[-1:] and endings[-1] in (".gz", ".zst") else endings[-1:])


def tokenize(jobs: Sequence[Job], cache: Path, processes: int | None, log: Log) -> int:
    """Make every shard that is not in the cache, whole; all cores if `processes` is None. Returns how many were made.

    Parallel runs share the work: each shard is made by the run that locks it first, and the others wait for it.

    Raises:
        DataError: a file cannot be read as a whole, or changed meanwhile.
        Interrupted: a worker was killed.
    """
    distinct = {job.key: job for job in jobs}
    missing = [job for job in distinct.values() if not is_whole(cache, job, log)]
    if not missing:
        return 0
    started, total = time.monotonic(), sum(job.file.stat().st_size for job in missing)
    sweep(cache)
    with progress("tokenizing", total, log) as advance:
        _make_all(missing, cache, 1 if total <= PART_BYTES else processes or _cores(), advance, log)
    seconds = time.monotonic() - started
    log(f"tokenized {len(missing)} of {len(distinct)} input files ({total / 1e6:.1f} MB) in {seconds:.1f} s")
    return len(missing)


def tokenize_file(job: Job, cache: Path) -> str:
    """One file, in this process: what a cluster maps over the files. Returns the shard's key."""
    tokenize([job], cache, 1, print)
    return job.key


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def is_whole(cache: Path, job: Job, log: Log) -> bool:
    """Whether the shard is there and every file has the bytes it was sealed with; a damaged one is told."""
    folder = cache / job.key
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if sealed == _described(folder):
            return True
    except FileNotFoundError:
        if not folder.exists():
            return False
    except (OSError, ValueError):
        pass
    log(f"{job.file.name}: its shard {job.key} in the cache is damaged; it is made again")
    return False


def _described(folder: Path) -> dict[str, Any]:
    return {file.name: [file.stat().st_size, sha256(file)] for file in sorted(folder.iterdir()) if file.name != SEAL}


def read_tally(cache: Path, job: Job) -> Tally:
    """The counts of a shard."""
    from xtuner_core.data import shard

    return shard.read_tally(cache / job.key)


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """No shard is cleaned up meanwhile: whoever does that locks the folder (the kernel's lock, which ends with its holder)."""
    cache.mkdir(parents=True, exist_ok=True)
    handle = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def link(cache: Path, job: Job, target: Path) -> None:
    """Give the shard's files a second name below `target`, so that they outlive the cache; copied where links are not possible. The
    shard's own modification time tells when it was used last.
    """
    target.mkdir(parents=True)
    os.utime(cache / job.key)
    for file in sorted((cache / job.key).iterdir()):
        if file.name != SEAL:
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)


Step = dict[Future[Any], int]
"""Work that the executor was given, and how many bytes of input each piece of it stands for."""
Maker = Generator[Step]
"""Makes one shard: a generator of steps, resumed when its step is done. An empty step means: ask me again later."""


def _make_all(jobs: Sequence[Job], cache: Path, processes: int, advance: Advance, log: Log) -> None:
    from xtuner_core.data.workers import workers

    active: set[Maker] = set()
    try:
        with workers(processes) as executor:
            _side_by_side((_maker(job, cache, executor, log) for job in jobs), active, advance)
    except BrokenExecutor:
        raise Interrupted(
            "a process that tokenized was killed, perhaps for lack of memory; run the same command again, or with fewer of them: "
            "--set data.workers=1."
        ) from None
    finally:
        for maker in active:  # only now, when no worker writes any more
            maker.close()


def _side_by_side(makers: Iterator[Maker], active: set[Maker], advance: Advance) -> None:
    """Take several makers through their steps together; those in `active` are not finished if this raises."""
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    owners: dict[Future[Any], tuple[Maker, int]] = {}
    pending: Counter[Maker] = Counter()
    ready: deque[Maker] = deque()
    while True:
        fresh = list(islice(makers, FILES_AT_ONCE - len(active)))
        active.update(fresh)
        ready.extend(fresh)
        if not active:
            return
        for maker in [ready.popleft() for _ in range(len(ready))]:
            step = next(maker, None)
            if step is None:
                active.remove(maker)
            elif not step:
                ready.append(maker)
            else:
                pending[maker] = len(step)
                for future, size in step.items():
                    owners[future] = maker, size
                    future.add_done_callback(finished.put)
        with suppress(Empty):
            future = finished.get(timeout=POLL_SECONDS if owners or ready else 0)
            maker, size = owners.pop(future)
            future.result()
            advance(size)
            pending[maker] -= 1
            if not pending[maker]:
                ready.append(maker)


def _maker(job: Job, cache: Path, executor: Executor, log: Log) -> Maker:
    from xtuner_core.data.inputs import parts_of
    from xtuner_core.data.shard import tokenize_part

    lock = _lock(cache, job.key)
    while not _try(lock):
        yield {}
    try:
        if is_whole(cache, job, log):  # another run made it while we waited
            return
        with _private(cache, job.key) as attempt:
            parts = parts_of(job.file, PART_BYTES)
            folders = [attempt / f"{number:06d}" for number in range(len(parts))]
            size = job.file.stat().st_size // max(1, len(parts))
            yield {
                executor.submit(tokenize_part, part, job.model_dir, job.encoding, folder): size
                for part, folder in zip(parts, folders, strict=True)
            }
            yield {executor.submit(_publish, job, folders, attempt / "whole", cache / job.key): 0}
    finally:
        lock.release()


def _publish(job: Job, parts: Sequence[Path], whole: Path, target: Path) -> None:
    """Join the parts and seal the whole. No fsync: what a power cut spoils no longer matches its seal."""
    from xtuner_core.data.shard import join_parts

    join_parts(parts, whole)
    if sha256(job.file) != job.digest:
        raise DataError(f"{job.file}: changed while it was read. Run the same command again.")
    (whole / SEAL).write_text(json.dumps(_described(whole)), encoding="utf-8")
    remove(target)
    os.rename(whole, target)


@contextmanager
def _private(cache: Path, key: str) -> Iterator[Path]:
    folder = cache / ".work" / f"{key}-{uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def _lock(cache: Path, key: str) -> FileLock:
    from filelock import FileLock

    folder = cache / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / key)


def _try(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def sweep(cache: Path) -> None:
    """Remove what makers left behind that were killed: nobody holds its lock."""
    for folder in (cache / ".work").glob("*"):
        lock = _lock(cache, folder.name.partition("-")[0])
        if _try(lock):
            try:
                remove(folder)
            finally:
                lock.release()
