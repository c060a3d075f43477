"""The bi-encoder: an encoder whose normalised, pooled hidden states are the embedding of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lodestar.config.schema import Pooling
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

    def forward(self, ids_BL: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor | float]:
        """(B, L) ids and (B,) lengths in tokens -> (B, D) unit vectors, fp32; and the temperature."""
        attention_mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        hidden_BLD = self.encoder(input_ids=ids_BL, attention_mask=attention_mask_BL.long()).last_hidden_state
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.float().exp()[0]
        embedding_BD = pool(hidden_BLD, attention_mask_BL, self.pooling)
        return F.normalize(embedding_BD.float(), dim=1), temperature
