"""Softmax, loss and gradient of a tile of logits, in place: a GPU reads and writes each logit once or twice.

Shape suffixes: R positions of a tile, V vocabulary, P columns of the tile: the vocabulary and what aligns it.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def softmax_nll_(logits_RP: Tensor, bias_V: Tensor | None, target_R: Tensor, vocabulary: int, scale: float) -> Tensor:
    """(R,) fp32: -log softmax(logits + bias)[target] in nats; logits_RP becomes scale * (softmax - one-hot target).

    logits_RP    fp32, bf16 or fp16, contiguous rows; columns from `vocabulary` on become 0. Arithmetic is fp32.
    target_R     int64, each below `vocabulary`
    scale        0: the logits stay as they are
    """
    nats_R = torch.empty(len(logits_RP), dtype=torch.float32, device=logits_RP.device)
    if len(logits_RP):
        _softmax_nll[(len(logits_RP),)](
            logits_RP,
            logits_RP if bias_V is None else bias_V,
            target_R,
            nats_R,
            scale,
            COLUMNS=logits_RP.shape[1],
            VOCABULARY=vocabulary,
            HAS_BIAS=bias_V is not None,
            WITH_GRAD=scale != 0,
            BLOCK=4096,
            num_warps=8,
        )
    return nats_R


@triton.jit
def _softmax_nll(
    logits,
    bias,
    target,
    nats,
    scale,
    COLUMNS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row: first its maximum and its sum of exponentials, then its gradient."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * COLUMNS
    target_column = tl.load(target + row)
    maximum, total, target_logit = -float("inf"), 0.0, 0.0
    for start in range(0, VOCABULARY, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < VOCABULARY
        x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        target_logit += tl.sum(tl.where(column == target_column, x, 0.0))
        previous, maximum = maximum, tl.maximum(maximum, tl.max(x))
        total = total * tl.exp(previous - maximum) + tl.sum(tl.exp(x - maximum))
    tl.store(nats + row, maximum + tl.log(total) - target_logit)
    if WITH_GRAD:
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < VOCABULARY
            x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - maximum) / total - tl.where(column == target_column, 1.0, 0.0)
            tl.store(logits + column, (gradient * scale).to(logits.dtype.element_ty), mask=column < COLUMNS)
