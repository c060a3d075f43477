"""The losses of fine-tuning. Tensor arithmetic only: no ranks, no model, no logging.

InfoNCE: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", equation 4.
Shape suffixes: B queries on this rank, M candidate passages (of all ranks), D embedding width, G passages of a query's
own row, T queries of a tile, N any texts, R positions of queries that are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive.config import TILE_BYTES


def info_nce(
    q_BD: Tensor, d_MD: Tensor, positive_B: Tensor, *, temperature: float, hidden_BM: Tensor | None = None
) -> Tensor:
    """-log p(positive) per query, where p = softmax over the M passages of q.d / temperature.

    q_BD, d_MD   unit rows, any float dtype; the product is taken in fp32 (fp64 stays fp64)
    positive_B   int64, the row of d_MD that answers each query
    hidden_BM    bool, pairs that are no negatives; false at the positives
    returns      (B,) nats; the caller divides by the *global* number of queries

    The plain form that tests compare with: it holds all scores, which training never does.
    """
    q_BD, d_MD = _exact(q_BD, d_MD)
    with _no_autocast(q_BD):
        scores_BM = q_BD @ d_MD.T / temperature
        if hidden_BM is not None:
            scores_BM = scores_BM.masked_fill(hidden_BM, -torch.inf)
        return F.cross_entropy(scores_BM, positive_B, reduction="none")


@dataclass(frozen=True)
class Identity:
    """Which texts are the same, by content hash, so that no query is pushed away from its own answer. All int64."""

    query_B: Tensor
    """Hash of each query's text."""
    passage_M: Tensor
    """Hash of each passage's text."""
    owner_M: Tensor
    """Hash of the query that a passage answers, or -1 where it came as a negative."""
    alone_B: Tensor
    """Bool: this query sees only the passages of its own row."""
    start_B: Tensor
    """Where those begin among the M passages, ..."""
    end_B: Tensor
    """... and end; neither is looked at where alone_B is false."""

    def hidden(self, positive_B: Tensor) -> Tensor:
        """(B, M) bool: the pairs that are no negatives, as `info_nce` takes them."""
        rows_B = torch.arange(len(positive_B), device=positive_B.device)
        return self.equal(rows_B, positive_B) | self.outside(rows_B, positive_B)

    def equal(self, rows_R: Tensor, positive_R: Tensor) -> Tensor:
        """(R, M) bool, false at the positives: the passage is the positive's text, or the query's, or answers one
        like it."""
        query_R1 = self.query_B[rows_R, None]
        equal_RM = self.passage_M == self.passage_M[positive_R, None]
        equal_RM |= self.passage_M == query_R1
        equal_RM |= self.owner_M == query_R1
        return equal_RM.scatter_(1, positive_R[:, None], False)

    def outside(self, rows_R: Tensor, positive_R: Tensor) -> Tensor:
        """(R, M) bool, false at the positives: the query is alone, and the passage is not of its row."""
        column_M = torch.arange(len(self.passage_M), device=self.passage_M.device)
        outside_RM = column_M < self.start_B[rows_R, None]
        outside_RM |= column_M >= self.end_B[rows_R, None]
        outside_RM &= self.alone_B[rows_R, None]
        return outside_RM.scatter_(1, positive_R[:, None], False)

    def touched(self, positive_B: Tensor) -> Tensor:
        """(B,) bool: whether `equal` holds anywhere in a query's row; by sorting, without looking at all pairs."""
        touched_B = _elsewhere(self.passage_M, self.passage_M[positive_B], positive_B)
        touched_B |= _elsewhere(self.passage_M, self.query_B, positive_B)
        return touched_B | _elsewhere(self.owner_M, self.query_B, positive_B)


class Share(NamedTuple):
    """What `contrastive_share` found; all scalar tensors, so that nothing waits for the device."""

    value: Tensor
    """Weighted sum of nats over this rank's queries; differentiable."""
    hidden: Tensor
    """int64: pairs that are no negatives because their texts are equal."""
    negatives: Tensor
    """int64: pairs that are negatives."""
    correct: Tensor
    """int64: queries whose positive scored above all their negatives."""


def contrastive_share(
    q_BD: Tensor,
    d_MD: Tensor,
    positive_B: Tensor,
    identity: Identity,
    *,
    temperature: float,
    weight: float | Tensor,
    tile_bytes: int = TILE_BYTES,
) -> Share:
    """Sum over queries of weight * `info_nce`, at one tile of scores at a time.

    q_BD, d_MD   unit rows, any float dtype; all arithmetic in fp32 (fp64 stays fp64), whatever autocast says
    positive_B   int64, the row of d_MD that answers each query
    weight       of each query, () or (B,): 1 / global number of queries
    tile_bytes   the most that scores may take; changes rounding only
    raises       ValueError where shapes do not fit together

    The gradient is known as soon as a tile's scores are, so the forward takes it and the backward only scales it.
    """
    if q_BD.shape[1] != d_MD.shape[1]:
        raise ValueError(f"query and passage widths differ: {q_BD.shape[1]} != {d_MD.shape[1]}")
    if not len(q_BD) == len(positive_B) == len(identity.query_B):
        raise ValueError(f"{len(q_BD)} queries, {len(positive_B)} positives, {len(identity.query_B)} query hashes")
    if not len(d_MD) == len(identity.passage_M) == len(identity.owner_M):
        raise ValueError(f"{len(d_MD)} passages, {len(identity.passage_M)} hashes, {len(identity.owner_M)} owners")
    q_BD, d_MD = _exact(q_BD, d_MD)
    wants = torch.is_grad_enabled()
    with torch.no_grad(), _no_autocast(q_BD):
        run = _Sums(q_BD, d_MD, temperature, wants and q_BD.requires_grad, wants and d_MD.requires_grad)
        weight_B = torch.as_tensor(weight, dtype=q_BD.dtype, device=q_BD.device).expand(len(q_BD))
        rows = max(1, tile_bytes // max(1, len(d_MD) * q_BD.element_size()))
        # Queries that need masks come in tiles of their own: only they pay for the comparisons.
        touched_B, alone_B = identity.touched(positive_B), identity.alone_B
        for chosen_B, equal, outside in (
            (~touched_B & ~alone_B, False, False),
            (touched_B & ~alone_B, True, False),
            (alone_B, True, True),
        ):
            for rows_T in _tiles(chosen_B.nonzero()[:, 0], rows):
                positive_T = positive_B[rows_T]
                equal_TM = identity.equal(rows_T, positive_T) if equal else None
                outside_TM = identity.outside(rows_T, positive_T) if outside else None
                run.add(rows_T, positive_T, weight_B[rows_T], equal_TM, outside_TM)
        negatives = len(q_BD) * max(0, len(d_MD) - 1) - run.hidden - run.outside
    value = _Known.apply(q_BD, d_MD, run.value, run.dq_BD, run.dd_MD)
    return Share(value, run.hidden, negatives, run.correct)


class _Sums:
    """Sums over tiles of queries x all passages. A learned temperature t needs no more: dt = -(q . dq).sum() / t."""

    def __init__(self, q_BD: Tensor, d_MD: Tensor, temperature: float, wants_dq: bool, wants_dd: bool) -> None:
        self.q_BD, self.d_MD, self.temperature = q_BD.detach(), d_MD.detach(), temperature
        self.dq_BD = torch.zeros_like(self.q_BD) if wants_dq else None
        self.dd_MD = torch.zeros_like(self.d_MD) if wants_dd else None
        self.value = q_BD.new_zeros(())
        self.hidden, self.outside, self.correct = q_BD.new_zeros(3, dtype=torch.int64)
        self.buffer = q_BD.new_empty(0)

    def add(
        self, rows_T: Tensor, positive_T: Tensor, weight_T: Tensor, equal_TM: Tensor | None, outside_TM: Tensor | None
    ) -> None:
        """nats = softplus(x), x = logsumexp(negatives) - positive: exact also where the positive wins by far, and
        with it the gradient, whose softmax over the negatives is multiplied by sigmoid(x) = 1 - p(positive)."""
        q_TD, positive_T1 = self.q_BD[rows_T], positive_T[:, None]
        scores_TM = torch.mm(q_TD / self.temperature, self.d_MD.T, out=self._scores(len(rows_T)))
        positive_score_T = scores_TM.gather(1, positive_T1)[:, 0]
        if outside_TM is not None:
            self.outside += outside_TM.count_nonzero()
            scores_TM.masked_fill_(outside_TM, -torch.inf)
        if equal_TM is not None:
            equal_TM = equal_TM if outside_TM is None else equal_TM & ~outside_TM
            self.hidden += equal_TM.count_nonzero()
            scores_TM.masked_fill_(equal_TM, -torch.inf)
        scores_TM.scatter_(1, positive_T1, -torch.inf)
        # The clamps let a query without any negative through: 0 nats, no gradient.
        most_T = scores_TM.amax(1).clamp_(min=torch.finfo(scores_TM.dtype).min)
        self.correct += (positive_score_T > most_T).count_nonzero()
        powers_TM = scores_TM.sub_(most_T[:, None]).exp_()
        total_T = powers_TM.sum(1).clamp_(min=1.0)
        x_T = most_T + total_T.log() - positive_score_T
        self.value += weight_T @ -F.logsigmoid(-x_T)
        if self.dq_BD is None and self.dd_MD is None:
            return
        # The powers stay as they are: what they lack is the same along a row, and multiplies the narrow side.
        powers_TM.scatter_(1, positive_T1, -total_T[:, None])
        scale_T1 = (weight_T * x_T.sigmoid() / (total_T * self.temperature))[:, None]
        if self.dq_BD is not None:
            self.dq_BD[rows_T] = (powers_TM @ self.d_MD).mul_(scale_T1)
        if self.dd_MD is not None:
            self.dd_MD.addmm_(powers_TM.T, q_TD.mul_(scale_T1))

    def _scores(self, rows: int) -> Tensor:
        """The same memory for every tile: fresh memory of this size costs page faults."""
        if self.buffer.numel() < rows * len(self.d_MD):
            self.buffer = self.buffer.new_empty(0)  # let go before taking more
            self.buffer = self.buffer.new_empty(rows * len(self.d_MD))
        return self.buffer[: rows * len(self.d_MD)].view(rows, len(self.d_MD))


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, d: Tensor, value: Tensor, dq: Tensor | None, dd: Tensor | None) -> Tensor:
        ctx.save_for_backward(dq, dd)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dq, dd = ctx.saved_tensors
        return (None if dq is None else dq * upstream, None if dd is None else dd * upstream, None, None, None)


def distillation_share(
    q_BD: Tensor,
    group_BGD: Tensor,
    teacher_BG: Tensor,
    *,
    temperature: float,
    weight: float | Tensor,
    valid_BG: Tensor | None = None,
) -> Tensor:
    """Sum over queries of weight * KL(softmax of teacher scores || softmax of q.d / temperature), over each row's own.

    q_BD, group_BGD   unit rows, any float dtype; arithmetic in fp32 (fp64 stays fp64)
    teacher_BG        the teacher's scores as they came, NaN where there is none; a row of NaN adds nothing
    weight            of each query, () or (B,)
    valid_BG          bool, false where a row has no such passage; none: all are there
    returns           () nats

    The teacher's scores are not divided, as in FlagEmbedding's `kl_div`, whose gradient this has.
    """
    q_BD, group_BGD = _exact(q_BD, group_BGD)
    with _no_autocast(q_BD):
        scores_BG = torch.einsum("bd,bgd->bg", q_BD, group_BGD) / temperature
        valid_BG = ~teacher_BG.isnan() if valid_BG is None else valid_BG & ~teacher_BG.isnan()
        least = torch.finfo(scores_BG.dtype).min  # not -inf: a row of nothing else would give NaN
        teacher_BG = teacher_BG.to(scores_BG.dtype).masked_fill(~valid_BG, least).log_softmax(1)
        student_BG = scores_BG.masked_fill(~valid_BG, least).log_softmax(1)
        nats_BG = (teacher_BG.exp() * (teacher_BG - student_BG)).masked_fill(~valid_BG, 0.0)
        return (weight * nats_BG.sum(1)).sum()


def matryoshka(x_ND: Tensor, width: int) -> Tensor:
    """(N, D) unit rows -> (N, width) unit rows: the first numbers alone, normalised again. The full width is as it was.

    Kusupati et al. 2022, "Matryoshka representation learning", section 3.
    """
    if not 0 < width <= x_ND.shape[1]:
        raise ValueError(f"width {width} is not one of 1 to {x_ND.shape[1]}")
    return x_ND if width == x_ND.shape[1] else F.normalize(x_ND[:, :width], dim=1)


def _exact(*tensors: Tensor) -> list[Tensor]:
    """In fp32, or in fp64 if one of them is."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _tiles(rows_R: Tensor, most: int) -> Sequence[Tensor]:
    """As few parts as hold at most so many rows, nearly equal; none of nothing."""
    return rows_R.tensor_split(-(-len(rows_R) // most)) if len(rows_R) else ()


def _elsewhere(column_M: Tensor, wanted_B: Tensor, positive_B: Tensor) -> Tensor:
    """(B,) bool: whether the column holds a query's hash anywhere but at its positive."""
    sorted_M = column_M.sort().values
    found_B = torch.searchsorted(sorted_M, wanted_B, right=True) - torch.searchsorted(sorted_M, wanted_B)
    return found_B > (column_M[positive_B] == wanted_B)
