"""Losses on the vocabulary that never hold positions x vocabulary logits at once. No ranks, no model.

Shape suffixes: N labelled positions, R positions of a tile, V vocabulary, P columns of a tile (the vocabulary, and what
aligns it), D width, B texts, L tokens (padded).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from retromae.config import HEAD_LOGITS

try:
    from retromae.vocabulary_kernel import softmax_nll_
except ImportError:  # triton comes with torch for GPUs
    softmax_nll_ = None

ALIGNED_COLUMNS = 64
"""Rows of logits that do not begin at a multiple of it slow the products down, on a CPU by 1.6."""


def summed_nll(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, tile_rows: int | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T + bias)[target], in nats; a scalar in fp32 (fp64 for fp64).

    The forward computes the gradient tile by tile, so that no logits are kept or computed twice. Under autocast the
    products run in its type; softmax, loss and sums of gradients are fp32. Raises ValueError where widths differ.

    hidden_ND    any float type; N may be 0
    target_N     int64, each in [0, V): labelled positions only
    tile_rows    rows of logits held at once; none: as many as are fast on the device. Changes rounding only.
    """
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden and weight widths differ: {hidden_ND.shape[1]} != {weight_VD.shape[1]}")
    tile_rows = tile_rows or _fast_tile_rows(hidden_ND.device.type, len(weight_VD))
    product_type = _product_type(hidden_ND)
    args = hidden_ND, weight_VD, bias_V, target_N, tile_rows, product_type, torch.is_grad_enabled()
    return cast(Tensor, _SummedNll.apply(*args))  # pyright: ignore[reportUnknownMemberType]


class _SummedNll(torch.autograd.Function):
    """`summed_nll`; the forward computes the gradients, the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        tile_rows: int,
        product_type: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        sum_type = torch.promote_types(product_type, torch.float32)
        needs_hidden, needs_weight, needs_bias = (needed and with_grad for needed in ctx.needs_input_grad[:3])
        needs_any, is_fused = needs_hidden or needs_weight or needs_bias, _is_fused(hidden_ND)
        N, V = len(hidden_ND), len(weight_VD)

        def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros_like(x, dtype=sum_type) if needed and x is not None else None

        total = torch.zeros((), dtype=sum_type, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # types are chosen below
            low_ND, low_PD = hidden_ND.to(product_type), weight_VD.to(product_type)
            if V % ALIGNED_COLUMNS:
                low_PD = F.pad(low_PD, (0, 0, 0, -V % ALIGNED_COLUMNS))
            grad_hidden_ND, grad_weight_PD = zeros(low_ND, needs_hidden), zeros(low_PD, needs_weight)
            grad_bias_P = zeros(None if bias_V is None else low_PD[:, 0], needs_bias)
            rows = min(tile_rows, N)
            low_RP = low_ND.new_empty(rows, len(low_PD))
            full_RP = low_RP if is_fused or product_type == sum_type else torch.empty_like(low_RP, dtype=sum_type)
            bias_P = None if is_fused else _aligned_bias(bias_V, V, len(low_PD), full_RP)
            for start in range(0, N, max(rows, 1)):
                tile = slice(start, min(start + rows, N))
                h_RD = low_ND[tile]
                logits_RP = torch.mm(h_RD, low_PD.T, out=low_RP[: len(h_RD)])
                if is_fused:
                    total += _fused_tile(logits_RP, bias_V, target_N[tile], V, grad_bias_P, needs_any)
                else:
                    total += _tile(logits_RP, full_RP[: len(h_RD)], bias_P, target_N[tile], grad_bias_P, needs_any)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[tile] = _product(logits_RP, low_PD)
                if grad_weight_PD is not None and product_type == sum_type:
                    grad_weight_PD.addmm_(logits_RP.T, h_RD)
                elif grad_weight_PD is not None:
                    grad_weight_PD += _product(logits_RP.T, h_RD)
        ctx.types = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.scale = _scale(product_type) if is_fused else 1.0
        ctx.save_for_backward(grad_hidden_ND, *(x if x is None else x[:V] for x in (grad_weight_PD, grad_bias_P)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor, grads = grad_output / ctx.scale, zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = [None if grad is None else (grad * factor).to(dtype) for grad, dtype in grads]
        return *scaled, None, None, None, None


def _aligned_bias(bias_V: Tensor | None, vocabulary: int, columns: int, like: Tensor) -> Tensor | None:
    """(P,): the bias, and minus infinity where a column stands for no token, so that its probability is 0."""
    if bias_V is None and columns == vocabulary:
        return None
    bias_P = like.new_full((columns,), -torch.inf)
    bias_P[:vocabulary] = 0.0 if bias_V is None else bias_V
    return bias_P


def _tile(
    logits_RP: Tensor,
    p_RP: Tensor,
    bias_P: Tensor | None,
    target_R: Tensor,
    grad_bias_P: Tensor | None,
    needs_gradient: bool,
) -> Tensor:
    """(): nats of a tile; logits_RP becomes its gradient, the softmax minus 1 at the target.

    p_RP   memory of the same size in fp32, or logits_RP itself
    """
    if p_RP.dtype != logits_RP.dtype:
        p_RP.copy_(logits_RP)
    if bias_P is not None:
        p_RP += bias_P
    target_R1 = target_R[:, None]
    target_logit_R1, max_logit_R1 = p_RP.gather(1, target_R1), p_RP.amax(1, keepdim=True)
    torch.softmax(p_RP, 1, out=p_RP)
    # The largest probability is exp(max_logit - logsumexp), and never denormal.
    nats = (max_logit_R1 - p_RP.amax(1, keepdim=True).log() - target_logit_R1).sum()
    if needs_gradient:
        p_RP.scatter_add_(1, target_R1, p_RP.new_full((1, 1), -1.0).expand_as(target_R1))
        if grad_bias_P is not None:
            grad_bias_P += p_RP.sum(0)
        if p_RP.dtype != logits_RP.dtype:
            logits_RP.copy_(p_RP)
    return nats


def _fused_tile(
    logits_RP: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    vocabulary: int,
    grad_bias_P: Tensor | None,
    needs_gradient: bool,
) -> Tensor:
    """`_tile` on a GPU, where a kernel leaves the gradient in the logits' own type, times `_scale`."""
    assert softmax_nll_ is not None
    nats_R = softmax_nll_(logits_RP, bias_V, target_R, vocabulary, _scale(logits_RP.dtype) if needs_gradient else 0.0)
    if grad_bias_P is not None:
        grad_bias_P += _product(logits_RP.new_ones(1, len(logits_RP)), logits_RP)[0]
    return nats_R.sum()


def _is_fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and softmax_nll_ is not None


def _scale(dtype: torch.dtype) -> float:
    """A factor of gradients that fp16 needs for small probabilities; their sums are fp32 and do not overflow."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on a GPU in fp32 also for half-precision factors, as it is added up there."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype.itemsize == 2 else a @ b


def bag_of_words_nll(
    hidden_BLD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_BL: Tensor, in_word_BL: Tensor
) -> Tensor:
    """DupMAE's bag-of-words term: a sum over texts, in nats; a scalar in fp32 (fp64 for fp64).

    For each text: the largest logit of each vocabulary entry over the words' tokens, log-softmax over the vocabulary,
    and minus its mean over the set of the text's tokens (Liu et al. 2023, "RetroMAE-2", section 3.2). Holds the logits
    of one text at a time, and none for the backward. A text without words adds 0.

    Three things differ from the published code. It divides by the number of tokens, not of distinct tokens, so that its
    term is smaller where tokens repeat. Its maximum includes the position of [SEP]. And special tokens that a text
    spells out are positions and targets there; of these, only [UNK] is one here.

    ids_BL       int64, the clean ids
    in_word_BL   bool, tokens of words: neither special, but for [UNK], nor pads
    """
    total = hidden_BLD.new_zeros((), dtype=torch.promote_types(hidden_BLD.dtype, torch.float32))
    # Tokens outside words repeat the text's first word: no number that the host does not know decides a shape.
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    first_B1 = in_word_BL.int().argmax(1, keepdim=True)
    position_BL = torch.where(in_word_BL, position_L, first_B1)
    has_words_B = in_word_BL.any(1)
    for hidden_LD, ids_L, pos_L, has_words in zip(hidden_BLD, ids_BL, position_BL, has_words_B, strict=True):
        with torch.no_grad():  # the bias is the same at each position, so the argmax does not depend on it
            argmax_V = pos_L[(hidden_LD[pos_L] @ weight_VD.T).max(0).indices]  # twice as fast as argmax on a CPU
        args = hidden_LD, weight_VD, bias_V, ids_L[pos_L], argmax_V
        nats = cast(Tensor, checkpoint(_text_nll, *args, use_reentrant=False, preserve_rng_state=False))
        total = total + nats * has_words
    return total


def _text_nll(hidden_LD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_L: Tensor, argmax_V: Tensor) -> Tensor:
    """Of one text; ids_L are of words, argmax_V is the position of each vocabulary entry's largest logit."""
    logits_V = (hidden_LD[argmax_V] * weight_VD).sum(1, dtype=torch.promote_types(hidden_LD.dtype, torch.float32))
    if bias_V is not None:
        logits_V = logits_V + bias_V
    in_text_V = torch.zeros_like(logits_V, dtype=torch.bool).scatter_(0, ids_L, True)
    return -(F.log_softmax(logits_V, 0) * in_text_V).sum() / in_text_V.sum()


def _product_type(x: Tensor) -> torch.dtype:
    """The type of the large products: autocast's where it is on. Without a kernel that scales, fp32 for fp16, which
    loses small probabilities."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return torch.float32 if dtype == torch.float16 and not _is_fused(x) else dtype


def _fast_tile_rows(device: str, vocabulary: int) -> int:
    """Rows of a tile: a CPU gains nothing beyond 256 and its cache prefers few; a GPU needs large products."""
    return 512 if device == "cpu" else max(512, HEAD_LOGITS // vocabulary)
