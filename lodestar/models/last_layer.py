"""The last layer of an encoder of which [CLS] vectors alone are read: what follows its attention is computed for [CLS].

That is a quarter of the layer's matrix products. Without dropout no result changes, but for rounding; with dropout
other numbers are drawn.
Shape suffixes: B padded texts, L tokens, N packed texts, T tokens of all of them, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lodestar.models.packed import NAME

FAMILIES = ("bert", "roberta", "xlm-roberta")
"""Those in whose layers what follows the attention stands in modules of its own, and reads one token at a time."""


def compute_cls_only(encoder: Any) -> list[RemovableHandle]:
    """From now on the last hidden states are (B, 1, D) of B padded texts, (1, N, D) of N packed ones: of first tokens.

    encoder   padding of its texts is on the right; of a family that is not in FAMILIES, or of other code than
              transformers', it stays as it is
    Returns what undoes it.
    """
    base: Any = encoder.base_model
    is_known = base.config.model_type in FAMILIES and type(base).__module__.startswith("transformers.")
    if not is_known or getattr(base.config, "chunk_size_feed_forward", 0):
        return []
    attention, first_tokens = base.encoder.layer[-1].attention, _FirstTokens()
    handles = [attention.output.register_forward_pre_hook(first_tokens.of_both)]
    if base.config._attn_implementation == NAME:
        handles.append(attention.self.register_forward_pre_hook(first_tokens.locate, with_kwargs=True))
    return handles


class _FirstTokens:
    """Of the texts that a layer reads."""

    def __init__(self) -> None:
        self._offsets_N1: Tensor | None = None
        """Of packed texts: known to the attention, and used by the module that follows at once."""

    def locate(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._offsets_N1 = kwargs.get("cu_seq_lens_q")

    def of_both(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Of what the attention gives, and of the residual."""
        if self._offsets_N1 is None:
            return tuple(hidden_BLD[:, :1] for hidden_BLD in args)
        return tuple(hidden_1TD.index_select(1, self._offsets_N1[:-1]) for hidden_1TD in args)
