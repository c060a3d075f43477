"""The bi-encoder: an encoder whose normalised, pooled hidden states are the embedding of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lodestar.config.schema import Pooling
from lodestar.data.padding import TextShape, is_token
from lodestar.models.hidden_states import hidden_states, offsets
from lodestar.models.packed import pool_packed
from lodestar.models.pooling import pool


class BiEncoder(nn.Module):
    """One encoder for queries and passages. A learned temperature is a parameter: engines and checkpoints have it."""

    def __init__(
        self, encoder: PreTrainedModel, temperature: float, *, learned: bool = False, pooling: Pooling = "cls"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.pooling: Pooling = pooling
        # Its logarithm is learned, as in CLIP (Radford et al. 2021, section 2.5): the temperature stays positive.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)])) if learned else None

    def forward(self, ids: Tensor, lengths_B: Tensor, shape: TextShape | None = None) -> tuple[Tensor, Tensor | float]:
        """(B, L) ids, or (T,) ids of packed texts -> (B, D) unit vectors, fp32; and the temperature."""
        hidden = hidden_states(self.encoder, ids, lengths_B, shape)
        if hidden.ndim == 3:
            embedding_BD = pool(hidden, is_token(lengths_B, ids.shape[1]), self.pooling)
        else:
            embedding_BD = pool_packed(hidden, offsets(lengths_B), self.pooling)
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.float().exp()[0]
        return F.normalize(embedding_BD.float(), dim=1), temperature
