"""Losses of other packages beside Lodestar's, on the same embeddings: what the optimizer gets at 1, 2 and 4 ranks.

    python -m tests.conformance.peers        prints the table of docs/numerics.md

Everything runs in double precision over real gloo processes. The reference is InfoNCE over the whole batch in one
process. Shape suffixes: N pairs, F input features, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from contrastive.loss import contrastive_local_loss, info_nce, matryoshka
from contrastive.negatives import NegativeMask
from lodestar.distributed.collectives import gather_rows
from lodestar.distributed.testing import run_world

PAIRS, FEATURES, WIDTH, NARROW = 16, 8, 6, 3
TEMPERATURE = 0.05
EVEN = {size: [PAIRS // size] * size for size in (1, 2, 4)}
UNEVEN = [9, 7]


class Measured(NamedTuple):
    loss: float
    grad: Tensor


class Encoder(nn.Module):
    """A linear layer that answers as a SentenceTransformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, WIDTH, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(_draw(WIDTH, FEATURES, seed=1))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.linear(features["input_ids"])}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, place: int) -> nn.Module:
        return self.linear

    def unit(self, x_NF: Tensor) -> Tensor:
        return F.normalize(self.linear(x_NF), dim=1)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts() -> tuple[Tensor, Tensor]:
    """(N, F) queries and passages."""
    return _draw(PAIRS, FEATURES, seed=2), _draw(PAIRS, FEATURES, seed=3)


# --- the losses ------------------------------------------------------------------------------


Loss = Callable[[Encoder, Tensor, Tensor, Sequence[int], int], Tensor]
"""(encoder, this rank's queries, passages, pairs of each rank, rank) -> what is backpropagated."""


def lodestar(encoder: Encoder, q_NF: Tensor, p_NF: Tensor, counts: Sequence[int], rank: int, *widths: int) -> Tensor:
    """The local loss; engines sum its gradient over ranks."""
    q_ND, p_ND = encoder.unit(q_NF), encoder.unit(p_NF)
    start, total = sum(counts[:rank]), sum(counts)
    p_MD = gather_rows(p_ND, counts)
    query_N, passage_M = 1000 + start + torch.arange(len(q_ND)), torch.arange(total)
    place_N = start + torch.arange(len(q_ND))
    mask = NegativeMask(
        anchor_B=query_N,
        answer_B=place_N,
        same_query_B=query_N,
        candidate_M=passage_M,
        owner_M=1000 + passage_M,
        positive_index_B=place_N,
        in_row_only_B=torch.zeros_like(place_N, dtype=torch.bool),
        start_B=place_N,
        end_B=place_N + 1,
    )
    losses = [
        contrastive_local_loss(
            matryoshka(q_ND, width),
            matryoshka(p_MD, width),
            matryoshka(p_ND, width),
            mask,
            temperature=TEMPERATURE,
            weight=1 / (total * max(1, len(widths))),
        ).value
        for width in widths or (WIDTH,)
    ]
    return torch.stack(losses).sum()


def _of_sentence_transformers(build: Callable[[Any], nn.Module]) -> Loss:
    def loss(encoder: Encoder, q_NF: Tensor, p_NF: Tensor, counts: Sequence[int], rank: int) -> Tensor:
        features = [{"input_ids": x_NF} for x_NF in (q_NF, p_NF)]
        return build(encoder)(features, torch.empty(0))

    return loss


SCALE: dict[str, Any] = {"scale": 1 / TEMPERATURE, "gather_across_devices": True}
NAME = "sentence-transformers"
LOSSES: dict[str, tuple[Loss, bool, bool]] = {
    "Lodestar": (lodestar, True, False),
    "Lodestar, Matryoshka": (lambda *given: lodestar(*given, WIDTH, NARROW), True, True),
    f"{NAME} MultipleNegativesRankingLoss": (
        _of_sentence_transformers(lambda model: MultipleNegativesRankingLoss(model, **SCALE)),
        False,
        False,
    ),
    f"{NAME} MultipleNegativesRankingLoss, no gather": (
        _of_sentence_transformers(lambda model: MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)),
        False,
        False,
    ),
    f"{NAME} CachedMultipleNegativesRankingLoss": (
        _of_sentence_transformers(lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2, **SCALE)),
        False,
        False,
    ),
    f"{NAME} MatryoshkaLoss": (
        _of_sentence_transformers(
            lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, **SCALE), [WIDTH, NARROW])
        ),
        False,
        True,
    ),
}
"""Name -> (loss, whether gradients are summed over ranks rather than averaged, whether it has two widths)."""


# --- measuring -------------------------------------------------------------------------------


def reference(*widths: int) -> Measured:
    """The mean of InfoNCE over the whole batch, and over the widths."""
    encoder = Encoder()
    q_ND, p_ND = (encoder.unit(x_NF) for x_NF in texts())
    losses = [
        info_nce(matryoshka(q_ND, width), matryoshka(p_ND, width), torch.arange(PAIRS), temperature=TEMPERATURE).mean()
        for width in widths or (WIDTH,)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert encoder.linear.weight.grad is not None
    return Measured(loss.item(), encoder.linear.weight.grad)


def local(rank: int, size: int, name: str, counts: Sequence[int]) -> Measured | str:
    """One rank's loss and gradient; what it raised, where it did."""
    warnings.simplefilter("ignore", FutureWarning)
    encoder, start = Encoder(), sum(counts[:rank])
    q_NF, p_NF = (x_NF[start : start + counts[rank]] for x_NF in texts())
    try:
        loss = LOSSES[name][0](encoder, q_NF, p_NF, counts, rank)
        loss.backward()
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error).__name__
    assert encoder.linear.weight.grad is not None
    return Measured(loss.item(), encoder.linear.weight.grad)


class Outcome(NamedTuple):
    """Of all ranks together, beside the reference."""

    factor: float
    """Of the gradient."""
    error: float
    """What is left of the gradient without the factor, relative to the reference."""
    loss: float
    """The logged loss over the reference's."""


def outcome(name: str, counts: Sequence[int]) -> Outcome | str:
    """What the optimizer gets; a word where a rank raised something."""
    size, (_, summed, two_widths) = len(counts), LOSSES[name]
    try:
        results = run_world(local, size, name, list(counts))
    except (BrokenProcessPool, AssertionError):  # gloo ends the process, or an error, where sizes differ
        return "fails"
    if failures := [result for result in results if isinstance(result, str)]:
        return failures[0]
    share = 1.0 if summed else 1 / size
    grad = share * torch.stack([result.grad for result in results]).sum(0)
    expected = reference(*((WIDTH, NARROW) if two_widths else ()))
    factor = float((grad * expected.grad).sum() / expected.grad.square().sum())
    error = float((grad / factor - expected.grad).norm() / expected.grad.norm())
    return Outcome(factor, error, share * sum(result.loss for result in results) / expected.loss)


def table() -> str:
    """Markdown: a row for each loss."""
    head = ["package and loss", "gradient at W = 1", "W = 2", "W = 4", "9 + 7 pairs"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in LOSSES:
        cells = [in_words(outcome(name, counts)) for counts in (*EVEN.values(), UNEVEN)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(result: Outcome | str) -> str:
    if isinstance(result, str):
        return result
    exact = "exact" if result.error < 1e-9 else f"{result.error:.0%} off"
    return f"{result.factor:.2f}, {exact}"


if __name__ == "__main__":
    print(table())
