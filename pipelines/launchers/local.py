"""Start the training processes on this machine with torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SHUTDOWN_SECONDS = 20
"""How long ranks get to save a checkpoint after SIGTERM (Prefect itself allows 30 s in all)."""


def command(processes: int, config: Path) -> list[str]:
    """The argument list; `--standalone` takes a free port of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, f"--shutdown-timeout={SHUTDOWN_SECONDS}", "-m", "xtuner_core.sft", "--config", str(config)]


def environment(processes: int) -> dict[str, str]:
    """This process's environment, with the cores shared out among the ranks.

    glibc returns every large tensor to the kernel and gets it back page by page; keeping freed memory makes CPU steps about a fifth
    faster.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    defaults = {
        "OMP_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": "100000",  # waiting threads spin a tenth of a millisecond, then sleep: nearly free alone, fair beside others
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages: another tenth
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}
