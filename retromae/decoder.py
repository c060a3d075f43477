"""The decoder: one transformer layer whose every position looks at its own selection of the text.

Xiao et al. 2022, "RetroMAE", section 3.3 (enhanced decoding); the layer is BERT's, with two input streams.
Shape suffixes: B texts, H heads, L tokens (padded), D width, d width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN


class Decoder(nn.Module):
    """LN(dense(attention(query, hiddens)) + query), then LN(feed-forward + residual); randomly initialised."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        feed_forward_width: int,
        activation: str,
        dropout: float,
        attention_dropout: float,
        norm_eps: float,
        init_std: float,
    ) -> None:
        super().__init__()
        self._heads, self._attention_dropout = heads, attention_dropout
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.rise, self.fall = nn.Linear(width, feed_forward_width), nn.Linear(feed_forward_width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self._activation, self._dropout = ACT2FN[activation], nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    @classmethod
    def for_encoder(cls, config: Any) -> Decoder:
        """A layer of the encoder's own sizes; families name some of them differently."""

        def first(*names: str, otherwise: Any) -> Any:
            return next((found for name in names if (found := getattr(config, name, None)) is not None), otherwise)

        return cls(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            feed_forward_width=config.intermediate_size,
            activation=first("hidden_act", "hidden_activation", otherwise="gelu"),
            dropout=first("hidden_dropout_prob", "mlp_dropout", otherwise=0.1),
            attention_dropout=first("attention_probs_dropout_prob", "attention_dropout", otherwise=0.1),
            norm_eps=first("layer_norm_eps", "norm_eps", otherwise=1e-12),
            init_std=first("initializer_range", otherwise=0.02),
        )

    def forward(self, query_BLD: Tensor, hiddens_BLD: Tensor, visible_B1LL: Tensor) -> Tensor:
        """(B, L, D); visible_B1LL is True where row i may look at column j."""
        context_BHLd = F.scaled_dot_product_attention(
            self._split(self.query(query_BLD)),
            self._split(self.key(hiddens_BLD)),
            self._split(self.value(hiddens_BLD)),
            attn_mask=visible_B1LL,
            dropout_p=self._attention_dropout if self.training else 0.0,
        )
        context_BLD = context_BHLd.transpose(1, 2).flatten(2)
        attended_BLD = self.attention_norm(self._dropout(self.dense(context_BLD)) + query_BLD)
        changed_BLD = self._dropout(self.fall(self._activation(self.rise(attended_BLD))))
        return self.norm(changed_BLD + attended_BLD)

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(2, (self._heads, -1)).transpose(1, 2)
