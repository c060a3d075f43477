"""Texts of different lengths as one matrix.

Shape suffixes: B texts, L tokens (padded), T tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lodestar.data.micro_batches import padded_width


class TextShape(NamedTuple):
    """What the host must know of texts before the device has them."""

    width: int
    """Tokens of the longest text; of a padded matrix, those of a row."""
    has_padding: bool

    @classmethod
    def of(cls, lengths_B: Tensor) -> TextShape:
        """Of texts that are padded on the right; `lengths_B` are on the CPU."""
        longest, shortest = (int(x) for x in (lengths_B.max(), lengths_B.min()))
        width = padded_width(longest)
        return cls(width, shortest < width)


def padded(sequences: Sequence[Any], fill: int) -> Tensor:
    """(B, L) int64, padded on the right with `fill`; L suits matrix units."""
    width = padded_width(max(map(len, sequences), default=1))
    padded_BL = np.full((len(sequences), width), fill, dtype=np.int64)
    for row_L, sequence in zip(padded_BL, sequences, strict=True):
        row_L[: len(sequence)] = sequence
    return torch.from_numpy(padded_BL)


def packed(sequences: Sequence[Any]) -> Tensor:
    """(T,) int64: the sequences end to end."""
    return torch.from_numpy(np.concatenate(sequences).astype(np.int64))


def is_token(lengths_B: Tensor, width: int) -> Tensor:
    """(B, L) bool: true at tokens, false at padding on the right."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
