"""The head's GPU kernel, interpreted on the CPU: TRITON_INTERPRET=1, and triton installed beside torch."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="comes with torch for GPUs")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 runs the kernel on the CPU", allow_module_level=True)

from retromae import loss
from retromae.loss import summed_nll
from retromae.vocabulary_kernel import softmax_nll_
from tests.unit.retromae.test_loss import a_problem, plain, value_and_grads

COLUMNS, VOCABULARY = 5056, 5000  # two blocks, the second one partly outside


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),  # the interpreter truncates to bf16
    [(torch.float32, 1.0, 1e-6), (torch.bfloat16, 1.0, 2**-7), (torch.float16, 1024.0, 2**-11)],
)
def test_the_kernel_gives_nats_and_their_gradient(
    dtype: torch.dtype, scale: float, tolerance: float, with_bias: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, COLUMNS, generator=draw)).to(dtype)
    bias = torch.randn(VOCABULARY, generator=draw) if with_bias else None
    target = torch.tensor([0, 4095, 4096, 4999, 17, 17, 1])
    exact = logits[:, :VOCABULARY].double() + (0.0 if bias is None else bias.double())
    unchanged = logits.clone()
    nats = softmax_nll_(unchanged, bias, target, VOCABULARY, 0.0)
    assert torch.equal(unchanged, logits)
    torch.testing.assert_close(nats.double(), F.cross_entropy(exact, target, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(softmax_nll_(logits, bias, target, VOCABULARY, scale), nats)
    gradient = (exact.softmax(1) - F.one_hot(target, VOCABULARY)) * scale
    assert not logits[:, VOCABULARY:].any()
    torch.testing.assert_close(logits[:, :VOCABULARY].double(), gradient, rtol=tolerance, atol=1e-6)
    assert (gradient.roll(1, 0) - logits[:, :VOCABULARY]).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_loss_with_the_kernel_is_the_loss_without(
    dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target = a_problem(torch.float32)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    expected = value_and_grads(plain(hidden, weight, bias if with_bias else None, target), *inputs)
    monkeypatch.setattr(loss, "_is_fused", lambda x: True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = summed_nll(hidden, weight, bias if with_bias else None, target, tile_rows=9)
    largest = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(value_and_grads(total, *inputs), expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < largest
