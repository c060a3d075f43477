"""The tower: an encoder whose normalised [CLS] vector is the embedding of a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from chassis.encoder import cls_of


class Tower(nn.Module):
    """Queries and passages alike."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, L) ids and (B,) lengths in tokens -> (B, D) unit vectors, fp32."""
        real_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        hidden_BLD = self.encoder(input_ids=ids_BL, attention_mask=real_BL.long()).last_hidden_state
        return F.normalize(cls_of(hidden_BLD).float(), dim=1)
