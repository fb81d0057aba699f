"""What this machine's GPU (or, without one, a CPU core) can do at most: matrix products and copies. Prints one line of JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

from training_job import Json, answer

REPEATS = 10


def main() -> Json:
    """TFLOP/s of a bf16 product of random square matrices; TB/s of a copy, read and written bytes together."""
    import torch

    cuda = torch.cuda.is_available()
    device, side, size = ("cuda", 8192, 2**32) if cuda else ("cpu", 256, 2**24)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "device_memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "gemm_tflops": 2 * side**3 / seconds(lambda: torch.mm(left, right)) / 1e12,
        "copy_tb_per_second": 2 * size / seconds(lambda: target.copy_(source)) / 1e12,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def seconds(work: Callable[[], object]) -> float:
    """Of one call, after three to warm up."""
    for _ in range(3):
        work()
    started = clock()
    for _ in range(REPEATS):
        work()
    return (clock() - started) / REPEATS


def clock() -> float:
    """When the device has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    answer(main)
