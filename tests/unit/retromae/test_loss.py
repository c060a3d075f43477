"""Tiled losses against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retromae.loss import bag_of_words_nll, summed_nll

N, V, D = 23, 50, 6


def a_problem(dtype: torch.dtype = torch.float64, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    target = torch.randint(V, (rows,), generator=g)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, target


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")


def value_and_grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, inputs)]  # the upstream gradient is not 1 in training


@pytest.mark.parametrize("tile_rows", [1, 5, 23, 64, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_cross_entropy_at_any_tile_size(
    tile_rows: int | None, with_bias: bool
) -> None:
    hidden, weight, bias, target = a_problem()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    actual = value_and_grads(summed_nll(hidden, weight, bias if with_bias else None, target, tile_rows), *inputs)
    expected = value_and_grads(plain(hidden, weight, bias if with_bias else None, target), *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    other_target = value_and_grads(plain(hidden, weight, bias if with_bias else None, (target + 1) % V), *inputs)
    assert all(
        (a - b).abs().max() > 1e-3 for a, b in zip(actual, other_target, strict=True) if a.ndim != 1 or with_bias
    )


def test_the_gradient_agrees_with_finite_differences() -> None:
    hidden, weight, bias, target = a_problem(rows=4)
    assert torch.autograd.gradcheck(lambda h, w, b: summed_nll(h, w, b, target, 3), (hidden, weight, bias))


def test_fp32_is_within_rounding_of_fp64_also_for_probabilities_of_0_and_1() -> None:
    hidden, weight, bias, target = a_problem(torch.float32)
    with torch.no_grad():
        hidden[:8] *= 100  # probabilities below the smallest fp32 number, and of exactly 1
        target[0] = F.linear(hidden, weight, bias)[0].argmax()
    actual = value_and_grads(summed_nll(hidden, weight, bias, target, 5), hidden, weight, bias)
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = value_and_grads(plain(doubles[0], doubles[1], doubles[2], target), *doubles)
    for a, b in zip(actual, expected, strict=True):
        # fp32 rounds logits of about 1,000 by 6e-5, and that is the relative error of a probability.
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4)
    assert actual[0].isfinite()


def test_nothing_labelled_is_zero_with_zero_gradients() -> None:
    hidden, weight, bias, target = a_problem(rows=0)
    loss, *grads = value_and_grads(summed_nll(hidden, weight, bias, target), hidden, weight, bias)
    assert loss.item() == 0.0 and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [(0, D), (V, D), (V,)]


def test_only_the_required_gradients_are_computed() -> None:
    hidden, weight, bias, target = a_problem()
    with torch.no_grad():
        assert not summed_nll(hidden, weight, bias, target, 5).requires_grad
    loss = summed_nll(hidden, weight.detach(), bias.detach(), target, 5)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(hidden, weight, bias, target), hidden)[0])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        summed_nll(hidden, weight.detach(), bias.detach(), target, 5)
    assert saved == [(N, D)]


def test_the_graph_can_be_walked_twice() -> None:
    hidden, weight, bias, target = a_problem()
    loss = summed_nll(hidden, weight, bias, target, 5)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight, bias)), first, rtol=0, atol=0)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_low_and_sums_fp32(low: torch.dtype) -> None:
    hidden, weight, bias, target = a_problem(torch.float32)
    exact = value_and_grads(plain(hidden, weight, bias, target), hidden, weight, bias)
    with torch.autocast("cpu", low):
        loss = summed_nll(hidden, weight, bias, target, 5)
    actual = value_and_grads(loss, hidden, weight, bias)
    assert all(x.dtype == torch.float32 for x in actual)
    assert float(actual[0]) == pytest.approx(float(exact[0]), rel=3e-3)
    for a, b in zip(actual[1:], exact[1:], strict=True):
        # bf16 keeps 8 bits: a product of rounded numbers is off by about 2**-8; fp16 runs in fp32.
        error = float((a - b).norm() / b.norm())
        assert error < (2e-2 if low == torch.bfloat16 else 1e-6)
        assert error > 1e-4 or low == torch.float16


def test_bf16_tensors_give_an_fp32_loss_and_bf16_gradients() -> None:
    hidden, weight, bias, target = a_problem(torch.bfloat16)
    loss = summed_nll(hidden, weight, bias, target, 5)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, (hidden, weight, bias)))
    expected = plain(hidden.double(), weight.double(), bias.double(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)


def test_widths_that_differ_are_an_error() -> None:
    hidden, weight, bias, target = a_problem()
    with pytest.raises(ValueError, match="widths differ: 5 != 6"):
        summed_nll(hidden[:, :5], weight, bias, target)


TEXTS, LENGTH = 3, 9


def a_bag_problem(dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(TEXTS, LENGTH, D, generator=g, dtype=dtype).requires_grad_()
    ids = torch.randint(12, (TEXTS, LENGTH), generator=g)  # few ids, so that some come twice
    in_word = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    in_word[:, 0] = False
    in_word[1, 5:] = False
    _, weight, bias, _ = a_problem(dtype)
    return (hidden, weight, bias), ids, in_word


def plain_bag(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, in_word: Tensor, twice: bool = False
) -> Tensor:
    total = torch.zeros((), dtype=hidden.dtype)
    for text in range(len(hidden)):
        positions = [i for i in range(hidden.shape[1]) if in_word[text, i]]
        tokens = [int(ids[text, i]) for i in positions]
        targets = tokens if twice else sorted(set(tokens))
        if targets:
            largest = torch.stack([weight @ hidden[text, i] + bias for i in positions]).amax(0)
            total = total - sum(largest.log_softmax(0)[token] for token in targets) / len(targets)
    return total


def test_the_bag_of_words_equals_the_plain_one() -> None:
    inputs, ids, in_word = a_bag_problem()
    actual = value_and_grads(bag_of_words_nll(*inputs, ids, in_word), *inputs)
    torch.testing.assert_close(
        actual, value_and_grads(plain_bag(*inputs, ids, in_word), *inputs), rtol=1e-12, atol=1e-12
    )
    assert abs((actual[0] - plain_bag(*inputs, ids, in_word, twice=True)).item()) > 1e-3
    assert abs((actual[0] - plain_bag(*inputs, ids, torch.ones_like(in_word))).item()) > 1e-3


def test_a_text_without_ordinary_tokens_adds_nothing_to_the_bag_of_words() -> None:
    inputs, ids, in_word = a_bag_problem()
    in_word[2] = False
    two = bag_of_words_nll(inputs[0][:2], inputs[1], inputs[2], ids[:2], in_word[:2])
    assert torch.equal(bag_of_words_nll(*inputs, ids, in_word), two)
    assert bag_of_words_nll(*inputs, ids, torch.zeros_like(in_word)).item() == 0.0


def test_the_bag_of_words_keeps_no_logits_for_the_backward() -> None:
    inputs, ids, in_word = a_bag_problem()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        bag_of_words_nll(*inputs, ids, in_word)
    assert max(saved, default=0) <= V * D  # the weight itself, and no texts x positions x vocabulary


def test_the_bag_of_words_works_under_autocast() -> None:
    inputs, ids, in_word = a_bag_problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = bag_of_words_nll(*inputs, ids, in_word)
    assert loss.dtype == torch.float32
    # Only the choice of the largest sees bf16: near ties may fall the other way.
    assert loss.item() == pytest.approx(plain_bag(*inputs, ids, in_word).item(), rel=1e-2)
