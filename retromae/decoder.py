"""The decoder of RetroMAE: one BERT layer whose queries and keys come from different streams.

Shape suffixes: B texts, L tokens (padded), D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from lodestar.errors import ModelError
from lodestar.models.cpu_dropout import Dropout, attention
from lodestar.models.cpu_linear import Linear


class Decoder(nn.Module):
    """Cross-attention, then a feed-forward block, each with dropout, residual and LayerNorm after it.

    Follows "Enhanced decoding" (Xiao et al. 2022, "RetroMAE"). Linear weights start normal, biases at zero.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward_width: int,
        activation: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"decoder: a width of {width} does not divide into {heads} heads (change either)")
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = Linear(width, feed_forward_width)
        self.activation = ACT2FN[activation]
        self.fc2 = Linear(feed_forward_width, width)
        self.output_norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    @classmethod
    def for_encoder(cls, config: Any) -> Decoder:
        """A decoder with the sizes and rates of an encoder's layer; ModelError where its configuration lacks one."""
        return cls(
            width=_first(config, "hidden_size"),
            heads=_first(config, "num_attention_heads"),
            feed_forward_width=_first(config, "intermediate_size"),
            activation=_first(config, "hidden_act", "hidden_activation", default="gelu"),
            dropout=_first(config, "hidden_dropout_prob", "mlp_dropout", default=0.1),
            attention_dropout=_first(config, "attention_probs_dropout_prob", "attention_dropout", default=0.1),
            norm_eps=_first(config, "layer_norm_eps", "norm_eps", default=1e-12),
            init_std=_first(config, "initializer_range", default=0.02),
        )

    def forward(self, query_BLD: Tensor, hiddens_BLD: Tensor, attention_mask_B1LL: Tensor) -> Tensor:
        """(B, L, D): the output at each query.

        query_BLD             one query for each position; also the residual of the attention
        hiddens_BLD           inputs of keys and values
        attention_mask_B1LL   bool, true where row i attends to column j; a row may be false everywhere
        """
        context_BLD = attention(
            self._split(self.query(query_BLD)),
            self._split(self.key(hiddens_BLD)),
            self._split(self.value(hiddens_BLD)),
            attention_mask_B1LL,
            self.attention_dropout if self.training else 0.0,
        )
        context_BLD = context_BLD.transpose(1, 2).flatten(2)
        attended_BLD = self.attention_norm(self.dropout(self.out_proj(context_BLD)) + query_BLD)
        return self.output_norm(self.dropout(self.fc2(self.activation(self.fc1(attended_BLD)))) + attended_BLD)

    def _split(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, heads, L, D / heads)."""
        return x_BLD.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that the configuration has: its name depends on the family."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    if default is None:
        raise ModelError(f"{type(config).__name__}: has no {' or '.join(names)} (name an encoder that has one)")
    return default
