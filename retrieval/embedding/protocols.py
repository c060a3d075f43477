"""What evaluation needs of a model. Loads without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from retrieval.embedding.config import Role

if TYPE_CHECKING:
    from torch import Tensor


class EmbedTexts(Protocol):
    def __call__(self, texts: Sequence[str], role: Role, /) -> Tensor:
        """(N, D) fp32 on the CPU, in the order of the texts."""
        ...


class EmbedTokens(Protocol):
    def __call__(self, input_ids_BL: Tensor, length_B: Tensor, /) -> Tensor:
        """(B, D) fp32 unit vectors."""
        ...
