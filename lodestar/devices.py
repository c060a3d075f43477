"""What depends on the device: whether the host may look at values, and how a GPU multiplies fp32 matrices.

TF32 keeps 10 bits of each factor's mantissa.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


def can_read(x: Tensor) -> bool:
    """Whether the host may look at values: on a GPU it would have to wait for all that is queued."""
    return x.is_cpu


def set_tf32(on: bool) -> None:
    """From now on, forward and backward; where nobody says so the environment decides, and some images turn TF32 on."""
    torch.backends.cuda.matmul.allow_tf32 = on  # unlike fp32_precision it keeps torch's older settings consistent


@contextmanager
def tf32(on: bool) -> Generator[None]:
    """For the products inside; nothing waits for the device."""
    before = torch.backends.cuda.matmul.fp32_precision == "tf32"
    set_tf32(on)
    try:
        yield
    finally:
        set_tf32(before)
