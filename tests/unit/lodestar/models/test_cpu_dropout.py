"""Dropout as it is drawn on a CPU, and attention with it, beside torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from contrastive.gradcache import graph_bytes
from lodestar.config.schema import ModelConfig
from lodestar.models.cpu_dropout import Dropout, attention, draw_keep_mask, use_cpu_dropout
from lodestar.models.hidden_states import prepare
from tests import tiny

RATE = 0.3
SHAPE = 3, 2, 5, 4


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def seeded(x: Tensor, rate: float) -> tuple[Tensor, float]:
    torch.manual_seed(1)
    return draw_keep_mask(x, rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_as_many_elements_stay_as_the_rate_says_at_every_place_of_a_word(rate: float) -> None:
    keep_mask, factor = seeded(torch.empty(1 << 18, 4), rate)
    deviation = (rate * (1 - rate) / (1 << 18)) ** 0.5
    assert torch.allclose(
        keep_mask.double().mean(0), torch.tensor(1 - rate).double(), rtol=0, atol=5 * deviation + 2**-16
    )
    assert factor == pytest.approx(1 / (1 - rate), rel=1e-4)
    neighbours = torch.corrcoef(keep_mask.double().T + 1e-9 * numbers(4, 1 << 18).detach())
    assert (neighbours - torch.eye(4)).abs().max() < 0.01


def test_a_module_keeps_and_scales_what_is_drawn_and_so_does_its_gradient() -> None:
    x, module = numbers(7, 5), Dropout(RATE)
    keep_mask, factor = seeded(x, RATE)
    torch.manual_seed(1)
    y = module(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (
        y.equal(x * keep_mask * factor)
        and grad.equal(keep_mask.double() * factor)
        and 0 < keep_mask.sum() < keep_mask.numel()
    )
    module.eval()
    assert module(x).equal(x)


def test_modules_are_replaced_and_parameters_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(RATE), nn.Linear(2, 2)), nn.Dropout(0.2))
    names = list(model.state_dict())
    model[2].eval()
    use_cpu_dropout(model)
    assert model[1][0].training and not model[2].training
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
    q, k, v = (x.detach().requires_grad_() for x in numbers(3, *SHAPE))

    def plain() -> Tensor:
        scores = q @ k.mT * (scale or SHAPE[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask.any(-1, keepdim=True)
        keep_mask, factor = seeded(weights, RATE)
        return weights * keep_mask * factor @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attention(q, k, v, mask, RATE, scale=scale)

    towards = numbers(*SHAPE).detach()
    actual, expected = ours(q, k, v), plain()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, (q, k, v), towards) for out in (actual, expected)))
    assert torch.autograd.gradcheck(ours, (q, k, v))


def test_attention_without_dropout_or_in_half_precision_is_that_of_torch() -> None:
    q, k, v = numbers(3, *SHAPE, dtype=torch.float32)
    assert attention(q, k, v, None, 0.0).equal(F.scaled_dot_product_attention(q, k, v))
    half = [x.bfloat16() for x in (q, k, v)]
    torch.manual_seed(1)
    actual = attention(*half, None, RATE)
    torch.manual_seed(1)
    assert actual.equal(F.scaled_dot_product_attention(*half, dropout_p=RATE))


def test_the_graph_is_smaller_than_that_of_torch() -> None:
    x = numbers(1, 1, 64, 64, dtype=torch.float32)
    assert graph_bytes(lambda: Dropout(RATE)(x)) == x.numel() < graph_bytes(lambda: F.dropout(x, RATE))
    assert graph_bytes(lambda: attention(x, x, x, None, RATE)) < 0.6 * graph_bytes(
        lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=RATE)
    )


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_attention_under_autocast_is_that_in_fp32(precision: torch.dtype) -> None:
    """Some families leave queries and keys in fp32 there."""
    q, k, v = (x.detach().requires_grad_() for x in numbers(3, *SHAPE, dtype=torch.float32))
    results: list[tuple[Tensor, ...]] = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=enabled):
            out = attention(q, k, v.to(precision) if enabled else v.to(precision).float(), None, RATE)
        assert out.dtype == (precision if enabled else torch.float32)
        results.append((out.float(), *torch.autograd.grad(out.float().sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("compiled", "replaced"), [(False, True), ("layers", False)])
def test_an_encoder_that_is_not_compiled_is_prepared_with_it(
    compiled: bool | str, replaced: bool, tmp_path: Path
) -> None:
    tiny.encoder(tmp_path, "bert", layers=1, width=16, dropout=0.1)
    encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    values = {"encoder": str(tmp_path), "compile": compiled}
    prepare(encoder, ModelConfig.model_validate(values), torch.device("cpu"))
    assert any(isinstance(module, Dropout) for module in encoder.modules()) == replaced
