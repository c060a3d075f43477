"""Losses on the vocabulary that never hold positions x vocabulary logits at once. No ranks, no model.

Shape suffixes: N labelled positions, R positions of a tile, V vocabulary, D width, B texts, L tokens (padded),
K tokens of one text's words.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from retromae.config import HEAD_LOGITS


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
        N, V = len(hidden_ND), len(weight_VD)
        needs_hidden, needs_weight, needs_bias = (needed and with_grad for needed in ctx.needs_input_grad[:3])

        def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros_like(x, dtype=sum_type) if needed and x is not None else None

        grad_hidden_ND, grad_weight_VD = zeros(hidden_ND, needs_hidden), zeros(weight_VD, needs_weight)
        grad_bias_V = zeros(bias_V, needs_bias)
        total = torch.zeros((), dtype=sum_type, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # types are chosen below
            low_ND, low_VD = hidden_ND.to(product_type), weight_VD.to(product_type)
            rows = min(tile_rows, N)
            low_RV = low_ND.new_empty(rows, V)
            full_RV = low_RV if product_type == sum_type else low_RV.new_empty(rows, V, dtype=sum_type)
            for start in range(0, N, max(rows, 1)):
                tile = slice(start, min(start + rows, N))
                h_RD, target_R1 = low_ND[tile], target_N[tile, None]
                product_RV = torch.mm(h_RD, low_VD.T, out=low_RV[: len(h_RD)])
                p_RV = full_RV[: len(h_RD)]
                if p_RV.dtype != product_RV.dtype:
                    p_RV.copy_(product_RV)
                if bias_V is not None:
                    p_RV += bias_V
                target_logit_R1, max_logit_R1 = p_RV.gather(1, target_R1), p_RV.amax(1, keepdim=True)
                torch.softmax(p_RV, 1, out=p_RV)
                # The largest probability is exp(max_logit - logsumexp), and never denormal.
                total += (max_logit_R1 - p_RV.amax(1, keepdim=True).log() - target_logit_R1).sum()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                p_RV.scatter_add_(1, target_R1, p_RV.new_full((1, 1), -1.0).expand_as(target_R1))
                if grad_bias_V is not None:
                    grad_bias_V += p_RV.sum(0)
                if p_RV.dtype != product_RV.dtype:
                    product_RV.copy_(p_RV)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[tile] = product_RV @ low_VD
                if grad_weight_VD is not None and product_type == sum_type:
                    grad_weight_VD.addmm_(product_RV.T, h_RD)
                elif grad_weight_VD is not None:
                    grad_weight_VD += product_RV.T @ h_RD
        ctx.types = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = [None if grad is None else (grad * grad_output).to(dtype) for grad, dtype in grads]
        return *scaled, None, None, None, None


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
    for hidden_LD, ids_L, in_word_L in zip(hidden_BLD, ids_BL, in_word_BL, strict=True):
        h_KD, ids_K = hidden_LD[in_word_L], ids_L[in_word_L]
        if len(h_KD):
            with torch.no_grad():  # the bias is the same at each position, so the argmax does not depend on it
                argmax_V = (h_KD @ weight_VD.T).max(0).indices  # twice as fast as argmax on a CPU
            args = h_KD, weight_VD, bias_V, ids_K, argmax_V
            total += cast(Tensor, checkpoint(_text_nll, *args, use_reentrant=False, preserve_rng_state=False))
    return total


def _text_nll(h_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_K: Tensor, argmax_V: Tensor) -> Tensor:
    """Of one text; argmax_V is the position of each vocabulary entry's largest logit."""
    logits_V = (h_KD[argmax_V] * weight_VD).sum(1, dtype=torch.promote_types(h_KD.dtype, torch.float32))
    if bias_V is not None:
        logits_V = logits_V + bias_V
    in_text_V = torch.zeros_like(logits_V, dtype=torch.bool).scatter_(0, ids_K, True)
    return -(F.log_softmax(logits_V, 0) * in_text_V).sum() / in_text_V.sum()


def _product_type(x: Tensor) -> torch.dtype:
    """The type of the large products: autocast's where it is on. fp32 for fp16, which loses small probabilities."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def _fast_tile_rows(device: str, vocabulary: int) -> int:
    """Rows of a tile: a CPU gains nothing beyond 256 and its cache prefers few; a GPU needs large products."""
    return 512 if device == "cpu" else max(512, HEAD_LOGITS // vocabulary)
