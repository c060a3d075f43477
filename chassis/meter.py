"""Speed, padding and memory between two log lines, and the bar that shows them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


class Meter:
    """Adds up what a rank has done since it was last read."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start, self._samples, self._tokens, self._padded = self._clock(), 0, 0, 0

    def add(self, *, samples: int, tokens: int, padded_tokens: int) -> None:
        self._samples += samples
        self._tokens += tokens
        self._padded += padded_tokens

    def read(self) -> dict[str, float]:
        seconds = max(self._clock() - self._start, 1e-9)
        found = {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "padding_share": 1 - self._tokens / max(1, self._padded),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._reset()
        return found


def peak_memory_bytes() -> int:
    """Of the GPU's allocator, or of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Bar:
    """Steps, loss, speed and time left on a terminal."""

    def __init__(self, *, total: int, initial: int, enabled: bool) -> None:
        self._bar = tqdm(total=total, initial=initial, disable=not enabled, unit="step", dynamic_ncols=True)

    def update(self, step: int, **shown: Any) -> None:
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
