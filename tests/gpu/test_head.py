"""The head's kernel on a GPU against double precision; skips itself elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retromae import loss
from retromae.loss import summed_nll

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
N, V, D = 1000, 30_522, 256  # no multiple of a tile or of what aligns it


def value_and_gradients(total: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total * 0.37, [x for x in inputs if x is not None])]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_those_of_double_precision(precision: torch.dtype, with_bias: bool) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, device="cuda")
    weight = torch.randn(V, D, generator=draw, device="cuda") / 16
    bias = torch.randn(V, generator=draw, device="cuda") if with_bias else None
    target = torch.randint(V, (N,), generator=draw, device="cuda")
    inputs = [None if x is None else x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        assert loss._is_fused(hidden), "triton is missing"
        total = summed_nll(*inputs, target, tile_rows=300)
    actual = value_and_gradients(total, *inputs)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    plain = F.cross_entropy(F.linear(exact[0], exact[1], exact[2]), target, reduction="sum")
    expected = value_and_gradients(plain, *exact)
    # Relative to the norm: fp32's rounding of sums; bf16 keeps 8 bits of each factor, fp16 11.
    largest = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[precision]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < largest
    other = value_and_gradients(F.cross_entropy(F.linear(exact[0], exact[1], exact[2]), target.flip(0)), *exact)
    assert float((actual[1] - other[1]).norm() / other[1].norm()) > 0.1  # negative control
