"""Dropout on a CPU: 16 random bits decide on an element, one byte remembers it.

torch draws a double for each element there, which makes dropout take twice as long, and keeps the mask in the type of
the elements. Shape suffixes: B texts, H attention heads, L tokens, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """nn.Dropout, but for how it is drawn on a CPU: there the rate is rounded to a multiple of 2^-16."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or not input.is_cpu:
            return super().forward(input)
        return cast(Tensor, _Dropout.apply(input, self.p))  # pyright: ignore[reportUnknownMemberType]


def use_cpu_dropout(module: nn.Module) -> None:
    """Replace every nn.Dropout inside; the names of parameters stay."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


def attention(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    mask: Tensor | None,
    dropout: float,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, H, L, D): torch's scaled_dot_product_attention, but for how dropout is drawn on a CPU.

    Under autocast it computes in fp32 there, as torch's does with dropout. Queries may be fewer than keys.

    mask   bool, broadcast to (B, H, L, L): whether a row attends to a column; a row may be false everywhere
    """
    is_plain = q_BHLD.shape[1] == k_BHLD.shape[1] and not is_causal
    is_exact = q_BHLD.dtype == k_BHLD.dtype == v_BHLD.dtype and q_BHLD.dtype in (torch.float32, torch.float64)
    if dropout > 0.0 and q_BHLD.is_cpu and is_plain and (is_exact or torch.is_autocast_enabled("cpu")):
        scale = 1 / math.sqrt(q_BHLD.shape[-1]) if scale is None else scale
        args = q_BHLD, k_BHLD, v_BHLD, mask, dropout, scale
        out_BHLD = cast(Tensor, _Attention.apply(*args))  # pyright: ignore[reportUnknownMemberType]
        return out_BHLD.to(v_BHLD.dtype)
    return F.scaled_dot_product_attention(
        q_BHLD, k_BHLD, v_BHLD, mask, dropout, is_causal, scale=scale, enable_gqa=q_BHLD.shape[1] != k_BHLD.shape[1]
    )


def draw_keep_mask(like: Tensor, dropout: float) -> tuple[Tensor, float]:
    """(uint8, 1 where an element stays, else 0; the factor of those), from torch's default generator."""
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    words = -(-like.numel() // 4)
    bits = torch.empty(words, dtype=torch.int64).random_(-(2**63), None)
    keep_mask = bits.view(torch.int16)[: like.numel()].view(like.shape) >= dropped - 2**15
    return keep_mask.view(torch.uint8), 2**16 / (2**16 - dropped)  # a product with bool would be slower


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float) -> Tensor:
        keep_mask, ctx.factor = draw_keep_mask(x, dropout)
        ctx.save_for_backward(keep_mask)
        return (x * keep_mask).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep_mask,) = ctx.saved_tensors
        return (grad * keep_mask).mul_(ctx.factor), None


class _Attention(torch.autograd.Function):
    """The weights after dropout are computed again in the backward, from those before it and the mask."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None, dropout: float, scale: float
    ) -> Tensor:
        scores_BHLL = (q_BHLD * scale) @ k_BHLD.mT
        if mask is not None:
            scores_BHLL.masked_fill_(~mask, -torch.inf)
        weights_BHLL = torch.softmax(scores_BHLL, -1)
        if mask is not None:
            weights_BHLL.masked_fill_(~mask.any(-1, keepdim=True), 0.0)  # of a row that attends to nothing
        keep_mask_BHLL, ctx.factor = draw_keep_mask(weights_BHLL, dropout)
        ctx.scale = scale
        ctx.save_for_backward(q_BHLD, k_BHLD, v_BHLD, weights_BHLL, keep_mask_BHLL)
        return torch.mul(weights_BHLL, keep_mask_BHLL, out=scores_BHLL).matmul(v_BHLD).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHLD, k_BHLD, v_BHLD, weights_BHLL, keep_mask_BHLL = ctx.saved_tensors
        grad_BHLD = grad_BHLD * ctx.factor
        dv_BHLD = (weights_BHLL * keep_mask_BHLL).mT @ grad_BHLD
        dweights_BHLL = (grad_BHLD @ v_BHLD.mT).mul_(keep_mask_BHLL)
        dscores_BHLL = torch._softmax_backward_data(dweights_BHLL, weights_BHLL, -1, weights_BHLL.dtype)
        dq_BHLD = (dscores_BHLL @ k_BHLD).mul_(ctx.scale)
        return dq_BHLD, dscores_BHLL.mT @ (q_BHLD * ctx.scale), dv_BHLD, None, None, None
