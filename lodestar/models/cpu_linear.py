"""Large linear layers on a CPU, in fp32, by oneDNN.

torch takes BLAS for them, which is MKL in its builds for x86: a tenth slower on AMD's processors, and the bias is
written first and read back. Shape suffixes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_PRODUCTS = 200_000_000
"""Multiplications from which on it is faster: oneDNN takes 0.3 ms to prepare for a number of rows that is new to it."""


class Linear(nn.Linear):
    """nn.Linear, but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        is_fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        is_eager = input.is_cpu and input.ndim > 1 and not torch.compiler.is_compiling()
        if not (is_eager and is_fp32 and has_onednn() and input.numel() * self.out_features >= MIN_PRODUCTS):
            return super().forward(input)
        out_NO = _Linear.apply(input.flatten(0, -2), self.weight, self.bias)  # pyright: ignore[reportUnknownMemberType]
        return cast(Tensor, out_NO).unflatten(0, input.shape[:-1])


def use_cpu_linear(module: nn.Module) -> None:
    """Let every nn.Linear inside compute by oneDNN where that is faster; parameters and hooks stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return _product(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad_NO, weight_OI.T) if needs_x else None,
            grad_NO.T @ x_NI if needs_weight else None,  # BLAS is as fast here
            grad_NO.sum(0) if needs_bias else None,
        )


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
