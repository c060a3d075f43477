"""From the hidden states of a text to its embedding.

Shape suffixes: B texts, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lodestar.config.schema import Pooling


def cls_of(hidden_BLD: Tensor) -> Tensor:
    """(B, L, D) -> (B, D): the [CLS] vectors."""
    return hidden_BLD[:, 0]


def mean_of(hidden_BLD: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """(B, L, D) -> (B, D), fp32: the mean over the tokens of each text, summed in fp32."""
    mask_BL1 = attention_mask_BL[..., None].to(hidden_BLD.dtype)
    count_B1 = mask_BL1.sum(1, dtype=torch.float32)
    return (hidden_BLD * mask_BL1).sum(1, dtype=torch.float32) / count_B1.clamp(min=1e-9)


def last_token_of(hidden_BLD: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """(B, L, D) -> (B, D): the vector of each text's last token, whichever side is padded."""
    position_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
    last_B11 = (position_L * attention_mask_BL).argmax(1)[:, None, None]
    return hidden_BLD.gather(1, last_B11.expand(-1, 1, hidden_BLD.shape[2]))[:, 0]


def pool(hidden_BLD: Tensor, attention_mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """(B, L, D) hidden states, (B, L) 1 at tokens and 0 at padding -> (B, D); for cls, padding must be on the right."""
    if pooling == "mean":
        return mean_of(hidden_BLD, attention_mask_BL)
    if pooling == "last_token":
        return last_token_of(hidden_BLD, attention_mask_BL)
    return cls_of(hidden_BLD)
