"""Encoders over texts laid end to end in one row of tokens: no padding.

Attention alone must know where texts end. It is exchanged through transformers' registry of attention functions, so
the code of the models stays theirs.
Shape suffixes: T tokens of all texts, N texts, H attention heads, L tokens of a text, D width.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from lodestar.config.schema import Pooling
from lodestar.errors import ModelError
from lodestar.models.cpu_dropout import attention
from lodestar.models.load import position_embeddings

NAME = "lodestar_packed"
"""Of the attention function, in transformers' registry."""


def enable_packed(encoder: PreTrainedModel) -> None:
    """Let an encoder read packed texts as well as padded ones; what it saves does not change.

    Raises ModelError where its hidden states of packed texts are not those of padded ones: a family with attention
    or positions of its own.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _padding_mask)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a family that does not know the registry is an error below
    try:
        encoder.set_attn_implementation(NAME)
        agrees = _agrees(encoder.base_model)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        agrees = False
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not agrees:
        raise ModelError(
            f"model.attention: packed: {type(encoder).__name__} cannot read texts laid end to end (set it to padded)"
        )


def packed_hidden(base: nn.Module, ids_T: Tensor, offsets_N1: Tensor, *, max_length: int) -> Tensor:
    """(T, D): the last hidden states of N texts, each of which attends to itself alone; of [CLS] only, (N, D).

    base         the base model of an encoder after `enable_packed`, without a language-model head
    ids_T        int64: the token ids of all texts, end to end
    offsets_N1   int32 or int64: where each text starts, and at last T. At least one text, none of them empty.
    max_length   tokens of the longest text, or more; known on the host, so that nothing waits for the device
    """
    offsets_N1 = offsets_N1.int()  # flash attention's type
    _, first_position = position_embeddings(base)
    position_1T = (text_positions(offsets_N1, len(ids_T)) + first_position)[None]
    # The names by which transformers' models pass such lengths down to their attention.
    lengths = {"cu_seq_lens_q": offsets_N1, "cu_seq_lens_k": offsets_N1, "max_length_q": max_length}
    output = base(input_ids=ids_T[None], position_ids=position_1T, max_length_k=max_length, **lengths)
    return output.last_hidden_state[0]


def text_index(offsets_N1: Tensor, tokens: int) -> Tensor:
    """(T,) int64: the text of each token. Nothing waits for the device."""
    token_T = torch.arange(tokens, device=offsets_N1.device, dtype=offsets_N1.dtype)
    return torch.searchsorted(offsets_N1[1:].contiguous(), token_T, right=True)


def text_positions(offsets_N1: Tensor, tokens: int) -> Tensor:
    """(T,) int64: the position of each token in its text, from 0."""
    token_T = torch.arange(tokens, device=offsets_N1.device)
    return token_T - offsets_N1.long().index_select(0, text_index(offsets_N1, tokens))


def pool_packed(hidden_TD: Tensor, offsets_N1: Tensor, pooling: Pooling) -> Tensor:
    """(T, D) hidden states of packed texts -> (N, D), as `lodestar.models.pooling.pool` of padded ones.

    For cls also (N, D) of first tokens. Where every text has one token, both are the same.
    """
    if pooling == "mean":
        return torch.segment_reduce(hidden_TD.float(), "mean", offsets=offsets_N1.long(), axis=0, unsafe=True)
    if pooling == "cls" and len(hidden_TD) == len(offsets_N1) - 1:
        return hidden_TD
    return hidden_TD.index_select(0, offsets_N1[:-1] if pooling == "cls" else offsets_N1[1:] - 1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (1, H, T, D) query, key and value of packed texts -> (1, T, H, D).

    Without cumulative lengths the texts are padded, and it is transformers' own function. A text may have fewer queries
    than keys; the result is of queries.

    sliding_window   a token attends to those fewer than so many positions away; none: to all of its text
    """
    causal: bool = getattr(module, "is_causal", True)  # transformers' default
    window = -1 if sliding_window is None else sliding_window - 1
    if cu_seq_lens_q is None or max_length_q is None or cu_seq_lens_k is None or max_length_k is None:
        if attention_mask is None:  # `_padding_mask` makes none, not even for a window
            attention_mask = _window_mask(query.shape[2], window, causal, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    if _on_gpu(query) and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        out_THD = torch.ops.aten._flash_attention_forward(
            q_THD, k_THD, v_THD, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, dropout, causal, False,
            scale=scaling, window_size_left=window, window_size_right=0 if causal else window,
        )[0]  # fmt: skip
    else:
        out_THD = _by_length(q_THD, k_THD, v_THD, cu_seq_lens_q, cu_seq_lens_k, dropout, causal, scaling, window)
    return out_THD[None], None


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _by_length(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    offsets_q_N1: Tensor,
    offsets_k_N1: Tensor,
    dropout: float,
    causal: bool,
    scaling: float | None,
    window: int,
) -> Tensor:
    """As `packed_attention`: one call for each run of texts of equal length. A GPU waits here for the lengths."""
    runs = _runs(torch.stack([offsets_q_N1, offsets_k_N1], 1).diff(dim=0).tolist())
    queries, keys = ([count * lengths[i] for count, lengths in runs] for i in range(2))
    splits = q_THD.split(queries), k_THD.split(keys), v_THD.split(keys)
    outputs: list[Tensor] = []
    for (count, (_, length)), *parts in zip(runs, *splits, strict=True):
        q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in parts)
        mask_LL = _window_mask(length, window, causal, q.device)
        out = attention(q, k, v, mask_LL, dropout, is_causal=causal and mask_LL is None, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor | None:
    """(L, L): tokens at most `window` positions away; none where that, or a window of -1, leaves out no token."""
    if not 0 <= window < length - 1:
        return None
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L
    return (distance_LL <= window) & (distance_LL >= (0 if causal else -window))


def _runs(lengths_N2: list[list[int]]) -> list[tuple[int, list[int]]]:
    """(count, lengths) of each run of texts of equal lengths: many where texts are sorted by length."""
    return [(len(list(run)), lengths) for lengths, run in groupby(lengths_N2)]


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """transformers' mask for padded texts; none for packed ones, which come without an attention mask."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


@torch.no_grad()
def _agrees(base: nn.Module) -> bool:
    """Whether the hidden states of two packed texts are those of the padded texts."""
    config: Any = base.config
    pad_id = config.pad_token_id or 0
    ids = [i for i in range(min(64, config.vocab_size)) if i != pad_id][:5]
    training = base.training
    base.eval()
    try:
        device = next(base.parameters()).device
        packed_TD = packed_hidden(
            base, torch.tensor(ids, device=device), torch.tensor([0, 3, 5], device=device), max_length=3
        )
        ids_BL = torch.tensor([ids[:3], [*ids[3:], pad_id]], device=device)
        mask_BL = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
        padded_BLD = base(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    finally:
        base.train(training)
    expected_TD = padded_BLD.flatten(0, 1)[:5]
    return bool((packed_TD - expected_TD).abs().max() <= 1e-4 * expected_TD.abs().max())
