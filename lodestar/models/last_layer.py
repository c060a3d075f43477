"""The last layer of an encoder of which [CLS] vectors alone are read, computed for [CLS] alone.

That is all of its work, but for the keys and values of other tokens on a GPU. Without dropout no result changes, but
for rounding; with dropout other numbers are drawn.
Shape suffixes: B texts (packed: 1), L tokens (packed: of all texts), N packed texts, Q first tokens (padded: 1, packed:
N), H heads, D width of a head, E width of [hidden states, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lodestar.models.packed import NAME

FAMILIES = ("bert", "roberta", "xlm-roberta")
"""Those whose last layer has BERT's modules, by their names."""


def compute_cls_only(encoder: Any) -> Callable[[], None] | None:
    """From now on the last hidden states are (B, 1, D) of B padded texts, (1, N, D) of N packed ones: of first tokens.

    encoder   padding of its texts is on the right; of a family that is not in FAMILIES, or of other code than
              transformers', it stays as it is
    Returns what undoes it; None where nothing was done.
    """
    base: Any = encoder.base_model
    config: Any = base.config
    is_known = config.model_type in FAMILIES and type(base).__module__.startswith("transformers.")
    if not is_known or config.is_decoder or config.chunk_size_feed_forward:
        return None
    if config._attn_implementation not in ("sdpa", NAME):
        return None
    attention = base.encoder.layer[-1].attention
    attention.forward = partial(_attention_of_first_tokens, attention)
    return partial(vars(attention).pop, "forward", None)  # another thread may have undone it


def _attention_of_first_tokens(
    attention: Any, hidden: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """In place of the forward of BertAttention and its like."""
    self_attention, offsets_N1 = attention.self, options.get("cu_seq_lens_q")
    first = hidden[:, :1] if offsets_N1 is None else hidden.index_select(1, offsets_N1[:-1])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, heads, queries, width) of first tokens, (B, heads, L, width) -> (B, queries, heads, width)."""
        lengths: dict[str, Any] = {}
        if offsets_N1 is not None:
            queries_per_text = query.shape[2] // first.shape[1]
            index_N1 = torch.arange(len(offsets_N1), dtype=torch.int32, device=hidden.device)
            lengths = {"cu_seq_lens_q": index_N1 * queries_per_text, "max_length_q": queries_per_text}
        attention_function = ALL_ATTENTION_FUNCTIONS[self_attention.config._attn_implementation]
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        dropout = self_attention.dropout.p if self_attention.training else 0.0
        more = {**options, **lengths, "dropout": dropout, "scaling": self_attention.scaling}
        return attention_function(self_attention, query, key, value, mask, **more)[0]

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self_attention.attention_head_size)).transpose(1, 2)

    q_BHQD = split_heads(self_attention.query(first))
    # A GPU's attention takes no heads as wide as the hidden states; ZeRO-3 may hold a part of the weights alone.
    if hidden.is_cpu and all(_is_whole(linear) for linear in (self_attention.key, self_attention.value)):
        out_BQHD = _attend_to_hidden_states(self_attention, q_BHQD, hidden, attend)
    else:
        key, value = self_attention.key(hidden), self_attention.value(hidden)
        out_BQHD = attend(q_BHQD, split_heads(key), split_heads(value))
    return attention.output(out_BQHD.flatten(2), first), None


def _is_whole(linear: nn.Module) -> bool:
    return isinstance(linear, nn.Linear) and linear.weight.shape == (linear.out_features, linear.in_features)


def _attend_to_hidden_states(
    self_attention: Any, q_BHQD: Tensor, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """(B, Q, H, D), without the keys and values of all tokens.

    They are linear in [hidden states, 1]. So a query is brought there instead, where all heads share what they read,
    and the context that it finds is brought back.
    """
    hidden_BLE = F.pad(hidden, (0, 1), value=1.0)
    key_HDE, value_HDE = (
        torch.cat([linear.weight, linear.bias[:, None]], 1).unflatten(0, (self_attention.num_attention_heads, -1))
        for linear in (self_attention.key, self_attention.value)
    )
    query_BQHE = torch.einsum("bhqd,hde->bqhe", q_BHQD, key_HDE)
    context_BQHE = attend(query_BQHE.flatten(1, 2)[:, None], hidden_BLE[:, None], hidden_BLE[:, None])
    return torch.einsum("bqhe,hde->bqhd", context_BQHE.reshape(query_BQHE.shape), value_HDE)
