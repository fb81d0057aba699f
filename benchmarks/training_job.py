"""What both sides of the training benchmarks share: the job's file, the documents' file, and how a step is measured.

Runs in the engine's and in the peers' environment: standard library and numpy only, torch inside functions.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
OUT_OF_MEMORY = "out of memory"
IGNORE = -100
SEED = 0
"""Of the order in which the engine takes the packs."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One training run to be measured: the model, the packs in their order, and what to learn them with."""

    model_dir: str
    random: bool
    """`model_dir` has a config only: random weights, made on the device."""
    data_dir: str
    method: str
    dtype: str
    """Precision of the computation: bf16 or fp32."""
    weights: str
    """Precision of the weights in the peers; the engine has its own rule."""
    lr: float
    packs_per_step: int = 1
    warmup: int = 2
    steps: int = 8
    """Timed steps, after the warm-up."""
    seconds: float = 1e9
    """Stop earlier than after `steps`, but not before two, when so much time was measured."""
    checkpointing: bool = False
    """Whether the peers recompute activations in the backward pass."""
    train: Json = field(default_factory=dict)
    """Further fields of the engine's TrainConfig."""

    @property
    def total(self) -> int:
        """All steps, the warm-up's too."""
        return self.warmup + self.steps

    def write(self, path: Path) -> Path:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> Job:
        """What `write` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents in training order: `ids` and `labels` (IGNORE: nothing to learn) of each, and how many each pack has."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    sizes: list[int]

    def packs(self) -> list[list[int]]:
        """Numbers of the documents of each pack."""
        ends = np.cumsum(self.sizes).tolist()
        return [list(range(end - size, end)) for end, size in zip(ends, self.sizes, strict=True)]

    def tokens(self, pack: Sequence[int]) -> int:
        """Tokens of some documents, none of them padding."""
        return sum(len(self.ids[number]) for number in pack)

    def take(self, packs: Sequence[Sequence[int]]) -> Documents:
        """Some packs, one after the other."""
        numbers = [number for pack in packs for number in pack]
        return Documents([self.ids[one] for one in numbers], [self.labels[one] for one in numbers], [len(pack) for pack in packs])

    def write(self, path: Path) -> None:
        """Flat arrays."""
        lengths = np.array([len(one) for one in self.ids])
        np.savez(path, ids=np.concatenate(self.ids), labels=np.concatenate(self.labels), lengths=lengths, sizes=np.array(self.sizes))

    @classmethod
    def read(cls, data_dir: str) -> Documents:
        """What `write` wrote."""
        file = np.load(Path(data_dir) / "documents.npz")
        ends = np.cumsum(file["lengths"])[:-1]
        ids, labels = (np.split(file[name].astype(np.int64), ends) for name in ("ids", "labels"))
        return cls(ids, labels, file["sizes"].tolist())


@dataclass(slots=True)
class Meter:
    """Times the steps of a job after its warm-up, and knows when there were enough."""

    job: Job
    done: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    """Bytes, of all steps: the engine's log begins to count anew after each."""
    _start: tuple[float, float] = (0.0, 0.0)
    _end: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Before a step."""
        if self.done == self.job.warmup:
            self._start = now()

    def end(self, tokens: int) -> bool:
        """After a step of so many tokens; True if it was the last."""
        self._end = now()
        self.peak = max(self.peak, peak_memory())
        self.done += 1
        self.tokens += tokens if self.done > self.job.warmup else 0
        enough = self.done >= self.job.warmup + 2 and self._end[0] - self._start[0] >= self.job.seconds
        return enough or self.done >= self.job.total

    def result(self) -> Json:
        """What the other side of the pipe reads."""
        wall, cpu = (end - start for end, start in zip(self._end, self._start, strict=True))
        return {
            "steps": self.done - self.job.warmup,
            "tokens": self.tokens,
            "seconds": wall,
            "tokens_per_second": self.tokens / wall,
            "tokens_per_cpu_second": self.tokens / cpu,
            "peak_memory": self.peak,
            "losses": self.losses,
        }


def now() -> tuple[float, float]:
    """Wall seconds and CPU-seconds of all threads, when the device has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic(), time.process_time()


def peak_memory() -> int:
    """Bytes: the most that tensors took on the GPU, or this process's largest resident set (VmHWM)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def answer(work: Callable[[], Json]) -> None:
    """Print the result of one side as the last line; a device that is too small is a result."""
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        result = {"failed": OUT_OF_MEMORY}
    print(json.dumps(result), flush=True)


def ask(python: str | Path, environment: dict[str, str], timeout: float, script: str, *arguments: str | Path) -> Json:
    """The answer of one side in a process of its own, or `{"failed": reason}`."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {timeout:.0f} s"}
    if done.returncode == -signal.SIGKILL:
        return {"failed": f"{OUT_OF_MEMORY} (killed)"}
    if done.returncode:
        sys.stderr.write(done.stderr[-3000:])
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def environment(threads: int) -> dict[str, str]:
    """Of a process that may use so many cores and looks for nothing outside this machine."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    more = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    return {**os.environ, **more}


def write_packs(documents: Documents, pack_length: int, folder: Path) -> None:
    """The documents for both sides: as the engine's packed data, and as one file for the peers, in the engine's order."""
    from xtuner_core.data import dataset
    from xtuner_core.data.order import packs_of_step
    from xtuner_core.data.pack import whole_documents
    from xtuner_core.data.tokenize import Document, Tokenized

    rows = zip(documents.ids, documents.labels, strict=True)
    lengths = np.array([len(ids) for ids in documents.ids])
    tokens = Tokenized.of([Document(ids.astype(np.uint32), labels != IGNORE) for ids, labels in rows])
    dataset.write_documents(folder / "documents" / "00000", [tokens])
    dataset.write_packs(folder / dataset.TRAINING, whole_documents(np.arange(len(lengths)), lengths, np.array(documents.sizes)))
    dataset.write_description(folder, {"pack_length": pack_length})
    packed, packs = dataset.PackedDataset(folder), documents.packs()
    documents.take([packs[number] for number in packs_of_step(packed, 0, len(packs), SEED)]).write(folder / "documents.npz")
