"""How fast this machine is, in three numbers that stand beside every figure: python benchmarks/yardstick.py

Each is the best of several runs, on one core.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable

import numpy as np
import torch


def main() -> None:
    print(json.dumps(measure()))


def measure() -> dict[str, float]:
    """Products of 600 x 600 matrices in fp32; the first touch of a page of memory; ten million additions in Python."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "gemm_gflops": round(2 * 600**3 / _best(_product()) / 1e9, 1),
            "page_fault_microseconds": round(_best(_touch, repeats=5) / PAGES * 1e6, 2),
            "python_loop_seconds": round(_best(_loop, repeats=3), 2),
        }
    finally:
        torch.set_num_threads(threads)


PAGES = 50_000


def _product() -> Callable[[], object]:
    a, b = torch.randn(600, 600), torch.randn(600, 600)
    return lambda: a @ b


def _touch() -> None:
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE) as memory:
        pages = np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE]
        pages[:] = 1
        del pages  # the mapping cannot be closed while it is looked at


def _loop() -> None:
    total = 0
    for i in range(10_000_000):
        total += i


def _best(work: Callable[[], object], repeats: int = 20) -> float:
    """Seconds."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
