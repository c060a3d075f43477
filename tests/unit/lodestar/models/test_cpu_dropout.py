"""Dropout as it is drawn on a CPU, and attention with it, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive.gradcache import graph_bytes
from lodestar.models.cpu_dropout import Dropout, attention, drawn, use_cpu_dropout

RATE = 0.3
SHAPE = 3, 2, 5, 4


def seeded(x: Tensor, rate: float) -> tuple[Tensor, float]:
    torch.manual_seed(1)
    return drawn(x, rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_as_many_elements_stay_as_the_rate_says_at_every_place_of_a_word(rate: float) -> None:
    kept, factor = seeded(torch.empty(1 << 18, 4), rate)
    deviation = (rate * (1 - rate) / (1 << 18)) ** 0.5
    assert torch.allclose(kept.double().mean(0), torch.tensor(1 - rate).double(), rtol=0, atol=5 * deviation + 2**-16)
    assert factor == pytest.approx(1 / (1 - rate), rel=1e-4)
    neighbours = torch.corrcoef(kept.double().T + 1e-9 * torch.rand(4, 1 << 18))
    assert (neighbours - torch.eye(4)).abs().max() < 0.01


def test_a_module_keeps_and_scales_what_is_drawn_and_so_does_its_gradient() -> None:
    x, module = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), Dropout(RATE)
    kept, factor = seeded(x, RATE)
    torch.manual_seed(1)
    y = module(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.equal(x * kept * factor) and grad.equal(kept.double() * factor) and 0 < kept.sum() < kept.numel()
    assert module.eval()(x) is not None and module(x).equal(x)


def test_modules_are_replaced_and_parameters_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(RATE), nn.Linear(2, 2)), nn.Dropout(0.2))
    names = list(model.state_dict())
    use_cpu_dropout(model)
    replaced = [module.p for module in model.modules() if isinstance(module, Dropout)]
    assert replaced == [RATE, 0.2] and list(model.state_dict()) == names


def masks() -> dict[str, Tensor | None]:
    """With a row that attends to nothing, and with one that attends to one place alone."""
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, 0, 2] = False
    return {"none": None, "of rows": mask, "of columns": torch.tensor([True, True, False, True, False])}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_the_plain_formula_with_the_mask_that_is_drawn(name: str, scale: float | None) -> None:
    mask = masks()[name]
    q, k, v = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def plain() -> Tensor:
        scores = q @ k.mT * (scale or SHAPE[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask.any(-1, keepdim=True)
        kept, factor = seeded(weights, RATE)
        return weights * kept * factor @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attention(q, k, v, mask, RATE, scale=scale)

    towards = torch.randn(SHAPE, dtype=torch.float64)
    found, expected = ours(q, k, v), plain()
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(out, (q, k, v), towards) for out in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(ours, (q, k, v))


def test_attention_without_dropout_or_in_half_precision_is_that_of_torch() -> None:
    q, k, v = torch.randn(3, *SHAPE)
    assert attention(q, k, v, None, 0.0).equal(F.scaled_dot_product_attention(q, k, v))
    half = [x.bfloat16() for x in (q, k, v)]
    torch.manual_seed(1)
    found = attention(*half, None, RATE)
    torch.manual_seed(1)
    assert found.equal(F.scaled_dot_product_attention(*half, dropout_p=RATE))


def test_the_graph_is_smaller_than_that_of_torch() -> None:
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    assert graph_bytes(lambda: Dropout(RATE)(x)) == x.numel() < graph_bytes(lambda: F.dropout(x, RATE))
    assert graph_bytes(lambda: attention(x, x, x, None, RATE)) < 0.6 * graph_bytes(
        lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=RATE)
    )
