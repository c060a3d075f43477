"""The last hidden states of an encoder on texts that are padded, or packed end to end.

Shape suffixes: B texts, L tokens (padded), T tokens of all texts, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lodestar.config.schema import ModelConfig
from lodestar.data.padding import TextShape, is_token
from lodestar.models.compile import compile_layers
from lodestar.models.cpu_dropout import use_cpu_dropout
from lodestar.models.cpu_linear import use_cpu_linear
from lodestar.models.last_layer import compute_cls_only
from lodestar.models.packed import enable_packed, packed_hidden


def prepare(encoder: PreTrainedModel, model: ModelConfig, device: torch.device, *, cls_only: bool = False) -> None:
    """Let an encoder read texts as the recipe says, and compile its layers for the device if it says so.

    cls_only   of the last hidden states [CLS] alone is read: `compute_cls_only`
    Raises ModelError where its family cannot read packed texts, ConfigError where nothing can be compiled.
    """
    if model.attention == "packed":
        enable_packed(encoder)
    if cls_only and not model.compile:  # compilers have not been tried on it
        compute_cls_only(encoder)
    if model.compile:
        compile_layers(encoder, device)
    elif device.type == "cpu":
        use_cpu_dropout(encoder)
        use_cpu_linear(encoder)


def hidden_states(base: nn.Module, ids: Tensor, lengths_B: Tensor, shape: TextShape | None = None) -> Tensor:
    """(B, L) ids -> (B, L, D), padded on the right; (T,) ids, texts end to end -> (T, D). The host never waits.

    Of an encoder that computes [CLS] only: (B, 1, D) and (B, D).
    shape   of the texts; none: ids are padded and hold padding
    """
    if ids.ndim == 1:
        assert shape is not None
        return packed_hidden(base, ids, offsets(lengths_B), max_length=shape.width)
    mask = None if shape is not None and not shape.has_padding else attention_mask(base, lengths_B, ids.shape[1])
    return base(input_ids=ids, attention_mask=mask).last_hidden_state


def offsets(lengths_B: Tensor) -> Tensor:
    """(B + 1,) int32: where each packed text begins, and where the last one ends."""
    return F.pad(lengths_B.cumsum(0), (1, 0)).int()


def first_tokens(lengths_B: Tensor, width: int | None) -> Tensor:
    """(B,) int64: the index of each text's first token among those of all rows of `width` tokens; none: packed."""
    if width is None:
        return lengths_B.cumsum(0) - lengths_B
    return torch.arange(len(lengths_B), device=lengths_B.device) * width


def unpacked(hidden_TD: Tensor, lengths_B: Tensor, width: int) -> Tensor:
    """(T, D) -> (B, width, D); what stands at padding is of no text."""
    position_L = torch.arange(width, device=lengths_B.device)
    index_BL = first_tokens(lengths_B, None)[:, None] + torch.minimum(position_L, lengths_B[:, None] - 1)
    return hidden_TD.index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape)


def attention_mask(base: nn.Module, lengths_B: Tensor, width: int) -> Tensor:
    """The mask of padding on the right, as transformers takes it.

    Where it may be, as (B, 1, L, L): transformers uses such a mask as it is. It looks into a (B, L) mask first, for
    which the host waits, and makes one for each kind of attention, as a sliding window.
    """
    is_token_BL = is_token(lengths_B, width)
    if not _takes_whole_mask(base):
        return is_token_BL.long()
    return is_token_BL[:, None, None].expand(-1, 1, width, -1)


def _takes_whole_mask(base: Any) -> bool:
    """Whether all layers attend to all tokens, by torch's scaled_dot_product_attention."""
    config = base.config
    kinds = ("sliding_window", "local_attention", "layer_types", "attention_chunk_size")
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and config.model_type in _BIDIRECTIONAL
        and not any(getattr(config, kind, None) for kind in kinds)
    )


_BIDIRECTIONAL = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert")
