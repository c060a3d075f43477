"""A process of `make bench-peers` that takes steps when it is told to.

It needs nothing but Python, and accelerate for bf16, because each package has an environment of its own. It prints a
line once it is ready, one after each step, and one at the end of its input.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(step: Callable[[int], object]) -> None:
    """Call step(0), step(1), ..., one for each line of the input, and print what each costs."""
    output = sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    print(json.dumps({"loaded_mib": _mib("VmRSS")}), file=output, flush=True)
    for i, _ in enumerate(sys.stdin):
        cpu, wall = time.process_time(), time.perf_counter()
        step(i)
        cost = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps(cost), file=output, flush=True)
    print(json.dumps({"peak_mib": _mib("VmHWM")}), file=output, flush=True)


def mixed_precision(model: Any, precision: str) -> None:
    """Let a model compute in bf16 as transformers' Trainer does: its forward by accelerate's."""
    if precision == "bf16":
        from accelerate import Accelerator

        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def _mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
