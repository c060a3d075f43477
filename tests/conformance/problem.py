"""One contrastive problem for the losses of all packages: what the optimizer gets from each, beside plain formulas.

The encoder is a linear layer in double precision, on 1, 2 or 4 gloo processes. Needs torch alone, because some packages
have an environment of their own.
Shape suffixes: B queries of this rank, N queries of all ranks, G passages of a query (the positive first), F features,
D embedding width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodestar.distributed.testing import run_world

QUERIES, GROUP, FEATURES, WIDTH, NARROW = 16, 2, 8, 6, 3
EVEN = {size: (QUERIES // size,) * size for size in (1, 2, 4)}
"""Queries of each rank, by world size."""
UNEVEN = (9, 7)
TEMPERATURE, OTHER_TEMPERATURE, FLAT = 0.05, 0.2, 1e9
"""At FLAT all scores are equal, so the loss is the logarithm of the number of candidates."""


class Shard(NamedTuple):
    """One rank's part of the problem."""

    q_BF: Tensor
    p_BGF: Tensor
    teacher_BG: Tensor
    """Scores."""
    temperature: float
    counts: Sequence[int]
    """Queries of each rank."""
    rank: int


Step = Callable[[nn.Linear, Shard], Tensor]
"""Leaves the gradient that the optimizer gets in the layer's weight, and returns the loss that is logged."""
Formula = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""((N, D) and (N, G, D) embeddings, (N, G) teacher scores, temperature) -> the loss of the whole batch."""


def info_nce(q_ND: Tensor, p_NGD: Tensor, teacher_NG: Tensor, temperature: float) -> Tensor:
    """Mean of -log softmax of the positive among all passages: van den Oord et al. 2018, equation 4."""
    scores_NM = F.normalize(q_ND, dim=1) @ F.normalize(p_NGD, dim=2).flatten(0, 1).T / temperature
    return F.cross_entropy(scores_NM, torch.arange(len(q_ND)) * p_NGD.shape[1])


def distillation(q_ND: Tensor, p_NGD: Tensor, teacher_NG: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of the student's softmax from the teacher's over a query's own passages."""
    student_NG = (F.normalize(q_ND, dim=1)[:, None] * F.normalize(p_NGD, dim=2)).sum(2) / temperature
    return F.kl_div(student_NG.log_softmax(1), teacher_NG.log_softmax(1), reduction="batchmean", log_target=True)


def over_widths(formula: Formula, q_ND: Tensor, p_NGD: Tensor, teacher_NG: Tensor, temperature: float) -> Tensor:
    """The mean over two widths: Kusupati et al. 2022, equation 1, with equal weights."""
    widths = [(q_ND[:, :width], p_NGD[..., :width]) for width in (WIDTH, NARROW)]
    return torch.stack([formula(q, p, teacher_NG, temperature) for q, p in widths]).mean()


matryoshka, matryoshka_distillation = (partial(over_widths, formula) for formula in (info_nce, distillation))


class Loss(NamedTuple):
    """A loss of a package, and the formula that it stands for."""

    step: Step
    formula: Formula = info_nce


def difference(first: Step, second: Step, linear: nn.Linear, shard: Shard) -> Tensor:
    """The step of a loss that a package offers only in a sum: the sum less the rest."""
    layers = [copy.deepcopy(linear) for _ in range(2)]  # DDP leaves hooks in the parameters
    losses = [step(layer, shard).detach() for step, layer in zip((first, second), layers, strict=True)]
    linear.weight.grad = gradient(layers[0]) - gradient(layers[1])
    return losses[0] - losses[1]


def gradient(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return linear.weight.grad


# --- measuring -------------------------------------------------------------------------------


class Measurement(NamedTuple):
    loss: float
    grad: Tensor


class Outcome(NamedTuple):
    """A loss beside its formula."""

    factor: float
    """Of the gradient."""
    error: float
    """What remains of the gradient's difference after division by the factor, relative to the formula's gradient."""
    loss: float
    """The logged loss over the formula's."""

    @property
    def exact(self) -> bool:
        return self.error < 1e-9


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(temperature: float) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """The encoder, and queries, passages and teacher scores of the whole batch."""
    linear = nn.Linear(FEATURES, WIDTH, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(_draw(WIDTH, FEATURES, seed=1))
    teacher_NG = _draw(QUERIES, GROUP, seed=4)
    if temperature == FLAT:
        teacher_NG = torch.tensor([[0.0] + [-1e4] * (GROUP - 1)] * QUERIES, dtype=torch.float64)  # p(positive) = 1
    return linear, _draw(QUERIES, FEATURES, seed=2), _draw(QUERIES, GROUP, FEATURES, seed=3), teacher_NG


def expected(formula: Formula, temperature: float) -> Measurement:
    """The formula over the whole batch, in this process."""
    linear, q_NF, p_NGF, teacher_NG = _inputs(temperature)
    loss = formula(linear(q_NF), linear(p_NGF), teacher_NG, temperature)
    loss.backward()
    return Measurement(loss.item(), gradient(linear))


def measure(
    rank: int, size: int, losses: Mapping[str, Loss], counts: Sequence[int], temperatures: Sequence[float]
) -> dict[tuple[str, float], Measurement]:
    """On one rank: every loss at every temperature."""
    torch.set_default_dtype(torch.float64)  # of tensors that packages make
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    results = {}
    for name, loss in losses.items():
        for temperature in temperatures:
            linear, q_NF, p_NGF, teacher_NG = _inputs(temperature)
            shard = Shard(q_NF[rows], p_NGF[rows], teacher_NG[rows], temperature, counts, rank)
            value = loss.step(linear, shard).item()
            results[name, temperature] = Measurement(value, gradient(linear))
    return results


def outcomes(
    losses: Mapping[str, Loss],
    counts: Sequence[int],
    temperatures: Sequence[float] = (TEMPERATURE, OTHER_TEMPERATURE, FLAT),
) -> dict[tuple[str, float], Outcome]:
    """Every loss at every temperature, in one world of as many processes as `counts` has numbers."""
    ranks = run_world(measure, len(counts), dict(losses), tuple(counts), tuple(temperatures))
    results = {}
    for name, temperature in ranks[0]:
        formula = expected(losses[name].formula, temperature)
        grad = ranks[0][name, temperature].grad
        assert all(torch.equal(rank[name, temperature].grad, grad) for rank in ranks)  # DDP has averaged it
        factor = float((grad * formula.grad).sum() / formula.grad.square().sum())
        error = float((grad / factor - formula.grad).norm() / formula.grad.norm())
        loss = sum(rank[name, temperature].loss for rank in ranks) / len(ranks)
        results[name, temperature] = Outcome(factor, error, loss / formula.loss)
    return results


# --- the rows of the table -------------------------------------------------------------------


HEAD = ("loss", "gradient at W = 1", "W = 2", "W = 4", "negatives at W = 4", "temperature", "9 + 7 queries")


def rows(
    losses: Mapping[str, Loss], by_size: Mapping[int, Mapping[tuple[str, float], Outcome]]
) -> dict[str, list[str]]:
    """The cells of each loss, but the last; by_size: outcomes by world size."""
    cells: dict[str, list[str]] = {}
    for name, loss in losses.items():
        factors = [in_words(result[name, TEMPERATURE]) for result in by_size.values()]
        hot, cold = (by_size[1][name, temperature] for temperature in (OTHER_TEMPERATURE, TEMPERATURE))
        honoured = hot.exact and math.isclose(hot.factor, cold.factor)
        # One process has the whole batch, so the number of its candidates is that of the formula.
        scale = by_size[4][name, FLAT].loss / by_size[1][name, FLAT].loss
        candidates = math.exp(expected(loss.formula, FLAT).loss * scale)
        cells[name] = [*factors, f"{candidates - 1:.0f}", "yes" if honoured else "no"]
    return cells


def uneven(name: str, loss: Loss) -> str:
    """The last cell, in a world of its own: gloo ends processes, or time runs out, where sizes differ."""
    try:
        return in_words(outcomes({name: loss}, UNEVEN, [TEMPERATURE])[name, TEMPERATURE])
    except (BrokenProcessPool, AssertionError):
        return "fails"


def in_words(result: Outcome) -> str:
    """The factor, and by how much the direction of the gradient is off."""
    return f"{result.factor:.2f}" if result.exact else f"{result.factor:.2f}, {result.error:.0%} off"


def table_of(losses: Mapping[str, Loss]) -> dict[str, list[str]]:
    """All cells of each loss."""
    by_size = {size: outcomes(losses, counts) for size, counts in EVEN.items()}
    return {name: [*cells, uneven(name, losses[name])] for name, cells in rows(losses, by_size).items()}
