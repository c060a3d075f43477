"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def lr_factor(step: int, *, total: int, warmup: int, floor: float, shape: str) -> float:
    """Multiplier on the peak learning rate for the update that takes `step` to `step + 1`.

    total, warmup   steps; floor is the share of the peak that is left at the end; shape: linear | cosine | constant
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    left = 1.0 - (step - warmup) / max(1, total - warmup)  # 1 -> 0
    curve = left if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return floor + (1.0 - floor) * curve
