"""The modules of a masked language model that RetroMAE calls, in every supported family.

Shape suffixes: N positions, B texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lodestar.errors import ModelError
from lodestar.models.load import position_embeddings


@dataclass(frozen=True)
class Parts:
    """Modules of a masked language model. RetroMAE calls them, so that ZeRO-3 can gather their weights."""

    base: nn.Module
    """input_ids, attention_mask -> last_hidden_state"""
    embeddings: nn.Module
    """input_ids or inputs_embeds -> (B, L, D), as the first layer reads them"""
    positions: nn.Embedding | None
    """The table of absolute positions; none where the backbone has rotary positions (RoPE)."""
    first_position: int
    """The row of `positions` for a text's first token."""
    head: Callable[[Tensor], Tensor]
    """(N, D) -> (N, D), the language-model head up to the vocabulary."""
    vocabulary: nn.Linear
    """(N, D) -> (N, V), tied to the word embeddings."""


def parts_of(model: PreTrainedModel) -> Parts:
    """The parts of a model of any family that names them as BERT, RoBERTa or ModernBERT do; ModelError otherwise."""
    base = model.base_model
    embeddings = getattr(base, "embeddings", None)
    vocabulary = model.get_output_embeddings()
    head = _head_of(model)
    if embeddings is None or vocabulary is None or head is None:
        raise ModelError(
            f"model.encoder: {type(model).__name__}: no embeddings or no masked-language-model head was found (name an "
            "encoder like BERT)"
        )
    return Parts(base, embeddings, *position_embeddings(base), head, vocabulary)


def _head_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if hasattr(model, "cls") and hasattr(model.cls, "predictions"):
        return model.cls.predictions.transform  # type: ignore[union-attr,return-value]
    if hasattr(model, "lm_head") and hasattr(model.lm_head, "layer_norm"):
        head: Any = model.lm_head
        return lambda x_ND: head.layer_norm(nn.functional.gelu(head.dense(x_ND)))
    return getattr(model, "head", None)
