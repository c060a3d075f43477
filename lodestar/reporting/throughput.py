"""Throughput, padding and memory between two log lines, and the console."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from tqdm import tqdm


class Throughput:
    """Counts the examples and tokens of this rank since the last `read`."""

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
        """Rates and padding since the last call, by their names in metrics.jsonl; starts a new count."""
        seconds = max(self._clock() - self._start, 1e-9)
        rates = {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "padding_share": 1 - self._tokens / max(1, self._padded),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._reset()
        return rates


def peak_memory_bytes() -> int:
    """Of the GPU's allocator; without a GPU, of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Console:
    """Loss, speed and remaining time: a progress bar on a terminal, a line at each log step elsewhere."""

    def __init__(self, *, total: int, initial: int, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        on_terminal = sys.stderr.isatty()
        self._plain, self._enabled, self._total = enabled and not on_terminal, enabled, total
        self._clock, self._start, self._initial = clock, clock(), initial
        self._bar = tqdm(
            total=total, initial=initial, disable=not (enabled and on_terminal), unit="step", dynamic_ncols=True
        )

    def update(self, step: int, *, loss: float, texts_per_second: float) -> None:
        self._bar.set_postfix({"loss": f"{loss:.4g}", "texts/s": f"{texts_per_second:.4g}"}, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._plain:
            seconds_per_step = (self._clock() - self._start) / max(1, step - self._initial)
            remaining = timedelta(seconds=round(seconds_per_step * (self._total - step)))
            self.print(
                f"step {step:,}/{self._total:,}  loss {loss:.4g}  {texts_per_second:,.4g} texts/s  {remaining} left"
            )

    def print(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._enabled:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
