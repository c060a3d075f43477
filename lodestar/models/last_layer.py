"""The last layer of an encoder whose [CLS] vectors alone are read: after its attention only they are computed.

Three quarters of the layer's matrix products are left out, and no result changes.
Shape suffixes: B texts, L tokens (padded), T tokens of all texts (packed), N texts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FAMILIES = ("bert", "roberta", "xlm-roberta")
"""Those in whose layers what follows the attention stands in modules of its own, and reads one token at a time."""


def keep_first_tokens(base: Any) -> list[RemovableHandle]:
    """From now on the last hidden states are of first tokens: (B, 1, D) of padded texts, (1, N, D) of packed ones.

    base   the base model of an encoder; of a family that is not in FAMILIES, or of other code than transformers', it
           stays as it is
    Returns what undoes it. Padding must be on the right.
    """
    is_known = base.config.model_type in FAMILIES and type(base).__module__.startswith("transformers.")
    if not is_known or getattr(base.config, "chunk_size_feed_forward", 0):
        return []
    attention, cut = base.encoder.layer[-1].attention, _Cut()
    return [
        attention.self.register_forward_hook(cut.after_attention, with_kwargs=True),
        attention.output.register_forward_pre_hook(cut.before_output),
    ]


class _Cut:
    """What attention gives, and what is added to it."""

    def __init__(self) -> None:
        self._offsets_N1: Tensor | None = None
        """Of the packed texts that are read: set by the attention for the module that follows at once."""

    def after_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        self._offsets_N1 = kwargs.get("cu_seq_lens_q")
        return self._first(output[0]), *output[1:]

    def before_output(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        attended, added = args
        return attended, self._first(added)

    def _first(self, hidden: Tensor) -> Tensor:
        if self._offsets_N1 is None:
            return hidden[:, :1]
        return hidden.index_select(1, self._offsets_N1[:-1])
