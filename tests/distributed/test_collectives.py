"""Collectives over real ranks: rows of equal and unequal counts, gathered with the right gradient and without waste."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lodestar.distributed import collectives
from lodestar.distributed.testing import run_world

WIDTH = 3


def rows_of(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(rank))


def weight_of(rank: int, total: int) -> torch.Tensor:
    """What each rank multiplies the gathered rows by."""
    return torch.randn(total, WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def gather(rank: int, size: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The rows of all ranks, the gradient of this rank's own, and whether its input went to the collective uncopied."""
    sent: list[int] = []
    send = collectives._all_gather
    collectives._all_gather = lambda output, x: sent.append(x.data_ptr()) or send(output, x)
    x_ND = rows_of(rank, counts[rank]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gathered_MD = collectives.gather_rows(x_ND, counts)
        (gathered_MD * weight_of(rank, sum(counts))).sum().backward()
    return gathered_MD.detach(), x_ND.grad, sent == [x_ND.data_ptr()]


@pytest.mark.parametrize("counts", [[4, 4], [4, 2], [0, 3], [3, 1, 2]], ids=str)
def test_rows_are_gathered_with_the_sum_of_all_ranks_gradients(counts: list[int]) -> None:
    size, total = len(counts), sum(counts)
    expected = torch.cat([rows_of(rank, count) for rank, count in enumerate(counts)])
    gradients = torch.stack([weight_of(rank, total) for rank in range(size)]).sum(0).split(counts)
    for rank, (gathered, gradient, uncopied) in enumerate(run_world(gather, size, counts)):
        assert gathered.equal(expected)
        assert gradient is not None and torch.allclose(gradient, gradients[rank], atol=1e-6)
        assert not torch.allclose(gradients[rank], weight_of(rank, total).split(counts)[rank]) or not counts[rank]
        assert uncopied == (counts[rank] == max(counts))


def on_main(rank: int, size: int, counts: list[int]) -> list[torch.Tensor]:
    return collectives.gather_on_main(rows_of(rank, counts[rank]).flatten(), [count * WIDTH for count in counts])


def test_only_rank_0_gets_what_is_gathered_on_it() -> None:
    counts = [2, 0, 5]
    of_main, *of_others = run_world(on_main, 3, counts)
    assert of_others == [[], []]
    assert [part.tolist() for part in of_main] == [rows_of(r, n).flatten().tolist() for r, n in enumerate(counts)]


def later(rank: int, size: int) -> tuple[float, float, float]:
    """Two maxima that are asked for before either is waited for, and the input afterwards."""
    x = torch.tensor(float(rank))
    waits: list[Any] = [collectives.max_over_ranks_later(x), collectives.max_over_ranks_later(-x)]
    return float(waits[0]()), float(waits[1]()), float(x)


def test_a_maximum_may_be_waited_for_later() -> None:
    assert run_world(later, 3) == [(2.0, 0.0, float(rank)) for rank in range(3)]
