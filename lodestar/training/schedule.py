"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def lr_factor(step: int, *, total: int, warmup: int, floor: float, shape: str) -> float:
    """Multiplier on the peak learning rate for the update that takes `step` to `step + 1`.

    The warm-up is (step + 1) / warmup; transformers has step / warmup, so that its first update has a rate of 0. After
    the warm-up both are the same.

    total, warmup   steps
    floor           fraction of the peak at the end
    shape           linear | cosine | constant, after the warm-up
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    remaining = 1.0 - (step - warmup) / max(1, total - warmup)  # 1 -> 0
    curve = remaining if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * remaining))
    return floor + (1.0 - floor) * curve
