"""Processes that tokenize, never outlive us, and leave a Ctrl-C to us."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from xtuner_core.signals import die_with_parent

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # one thread each: the processes are the parallelism
    "RAYON_NUM_THREADS": "1",
    "FASTOKENS_BPE_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages
}
"""What is set for each process that tokenizes."""


class Here(Executor):
    """Does the work at once, in this process; what it raises comes out of `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """An executor with `count` processes (with one, this process); none is left when the block ends, however it ends.

    Each is a fresh interpreter (spawn): a fork would copy the locks of our other threads. They are told to die when the thread
    that uses the executor ends, so enter, use and leave the block in one thread.
    """
    if count == 1:
        yield Here()
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))
    try:
        with _later(signal.SIGINT), _environment(ENVIRONMENT):  # born with our mask: a Ctrl-C is for us, and we end them
            for _ in range(count):
                pool.submit(os.getpid)
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    die_with_parent(parent)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables until the block ends: an allocator reads its own before any of our code runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _later(number: signal.Signals) -> Iterator[None]:
    """Hold the signal back until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
