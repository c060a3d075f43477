"""Losses on the vocabulary that never hold positions x vocabulary logits at once. No ranks, no model.

Shape suffixes: N labelled positions, R rows of a chunk, V vocabulary, D width, B texts, L tokens (padded), K counted
positions of one text.
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
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T + bias)[target], in nats; a scalar in fp32 (fp64 for fp64).

    The gradient is computed in the forward, chunk by chunk, so that no logits are kept or computed twice. Under
    autocast the products run in its type; softmax, loss and sums of gradients are fp32.

    hidden_ND    any float type; N may be 0
    target_N     int64, each in [0, V): give labelled positions only
    chunk_rows   rows of logits held at once; None: as many as are fast on the device. Changes rounding only.
    """
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden and weight widths differ: {hidden_ND.shape[1]} != {weight_VD.shape[1]}")
    chunk_rows = chunk_rows or _fast_rows(hidden_ND.device.type, len(weight_VD))
    product_type = _product_type(hidden_ND)
    grad = torch.is_grad_enabled()
    args = hidden_ND, weight_VD, bias_V, target_N, chunk_rows, product_type, grad
    return cast(Tensor, _SummedNll.apply(*args))  # pyright: ignore[reportUnknownMemberType]


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        chunk_rows: int,
        product_type: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        sum_type = torch.promote_types(product_type, torch.float32)
        N, V = len(hidden_ND), len(weight_VD)
        to_hidden, to_weight, to_bias = (wanted and with_grad for wanted in ctx.needs_input_grad[:3])

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like, dtype=sum_type) if wanted and like is not None else None

        grad_hidden_ND, grad_weight_VD = zeros(hidden_ND, to_hidden), zeros(weight_VD, to_weight)
        grad_bias_V = zeros(bias_V, to_bias)
        total = torch.zeros((), dtype=sum_type, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # the types are chosen here
            low_ND, low_VD = hidden_ND.to(product_type), weight_VD.to(product_type)
            rows = min(chunk_rows, N)
            low_RV = low_ND.new_empty(rows, V)
            full_RV = low_RV if product_type == sum_type else low_RV.new_empty(rows, V, dtype=sum_type)
            for first in range(0, N, max(rows, 1)):
                chunk = slice(first, min(first + rows, N))
                h_RD, target_R1 = low_ND[chunk], target_N[chunk, None]
                product_RV = torch.mm(h_RD, low_VD.T, out=low_RV[: len(h_RD)])
                p_RV = full_RV[: len(h_RD)]
                if p_RV.dtype != product_RV.dtype:
                    p_RV.copy_(product_RV)
                if bias_V is not None:
                    p_RV += bias_V
                answer_R1, top_R1 = p_RV.gather(1, target_R1), p_RV.amax(1, keepdim=True)
                torch.softmax(p_RV, 1, out=p_RV)
                # The largest probability is exp(top - logsumexp), and never denormal.
                total += (top_R1 - p_RV.amax(1, keepdim=True).log() - answer_R1).sum()
                if not (to_hidden or to_weight or to_bias):
                    continue
                p_RV.scatter_add_(1, target_R1, p_RV.new_full((1, 1), -1.0).expand_as(target_R1))
                if grad_bias_V is not None:
                    grad_bias_V += p_RV.sum(0)
                if p_RV.dtype != product_RV.dtype:
                    product_RV.copy_(p_RV)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[chunk] = product_RV @ low_VD
                if grad_weight_VD is not None and product_type == sum_type:
                    grad_weight_VD.addmm_(product_RV.T, h_RD)
                elif grad_weight_VD is not None:
                    grad_weight_VD += product_RV.T @ h_RD
        ctx.types = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = [None if grad is None else (grad * upstream).to(dtype) for grad, dtype in grads]
        return *scaled, None, None, None, None


def bag_of_words_nll(
    hidden_BLD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_BL: Tensor, counted_BL: Tensor
) -> Tensor:
    """DupMAE's bag-of-words term: a sum over texts, in nats; a scalar in fp32 (fp64 for fp64).

    For each text: the largest logit of each vocabulary entry over the counted positions, log-softmax over the
    vocabulary, and minus its mean over the set of the text's own tokens (Liu et al. 2023, "RetroMAE-2"; their code
    divides by the number of tokens, not of different ones, and lets [SEP]'s position count). No more than one text's
    logits are held at a time, and none for the backward. A text without counted positions adds 0.

    ids_BL       int64, the clean ids
    counted_BL   bool, ordinary tokens: neither special nor pads
    """
    total = hidden_BLD.new_zeros((), dtype=torch.promote_types(hidden_BLD.dtype, torch.float32))
    for hidden_LD, ids_L, counted_L in zip(hidden_BLD, ids_BL, counted_BL, strict=True):
        h_KD, ids_K = hidden_LD[counted_L], ids_L[counted_L]
        if len(h_KD):
            with torch.no_grad():  # the bias is the same at each position, so it does not move the largest
                best_V = (h_KD @ weight_VD.T).max(0).indices  # twice as fast as argmax on a CPU
            args = h_KD, weight_VD, bias_V, ids_K, best_V
            total += cast(Tensor, checkpoint(_text_nll, *args, use_reentrant=False, preserve_rng_state=False))
    return total


def _text_nll(h_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_K: Tensor, best_V: Tensor) -> Tensor:
    logits_V = (h_KD[best_V] * weight_VD).sum(1, dtype=torch.promote_types(h_KD.dtype, torch.float32))
    if bias_V is not None:
        logits_V = logits_V + bias_V
    own_V = torch.zeros_like(logits_V, dtype=torch.bool).scatter_(0, ids_K, True)
    return -(F.log_softmax(logits_V, 0) * own_V).sum() / own_V.sum()


def _product_type(x: Tensor) -> torch.dtype:
    """The type of the large products: autocast's where it is on. fp16 would lose small probabilities: fp32 instead."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def _fast_rows(device: str, vocabulary: int) -> int:
    """Rows of a chunk: on a CPU speed is flat from 256 on and the cache likes few; a GPU wants large products."""
    return 512 if device == "cpu" else max(512, HEAD_LOGITS // vocabulary)
