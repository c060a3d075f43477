"""From the hidden states of a text to its embedding.

Shape suffixes: B texts, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def cls_of(hidden_BLD: Tensor) -> Tensor:
    """(B, L, D) -> (B, D): the [CLS] vectors."""
    return hidden_BLD[:, 0]
