"""The losses of fine-tuning. Tensor arithmetic only: no ranks, no model, no logging.

InfoNCE: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", equation 4.
An anchor is pulled to its answer and pushed from candidates: a query to its passage, from all other passages.
Shape suffixes: B anchors on this rank, M candidates (of all ranks), D embedding width, G passages of a query's own row,
T anchors and C candidates of a tile, N texts, R anchors with the same masking.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive.config import TILE_BYTES
from contrastive.negatives import NegativeMask
from lodestar.devices import can_read, tf32

LEAST_ROWS, MOST_ROWS_ON_CPU = 96, 256
"""Anchors of a tile: below the first it costs less to compute scores twice, in tiles of some candidates; a CPU gains
nothing beyond the second."""


def info_nce(
    q_BD: Tensor, d_MD: Tensor, positive_B: Tensor, *, temperature: float, not_negative_BM: Tensor | None = None
) -> Tensor:
    """-log p(positive) per query, where p = softmax over the M passages of q.d / temperature.

    q_BD, d_MD        unit rows, any float dtype; the product is computed in fp32 (fp64 stays fp64)
    positive_B        int64, the row of d_MD that answers each query
    not_negative_BM   bool, pairs that are no negatives; false at the positives
    returns           (B,) nats; the caller divides by the *global* number of queries

    The reference for tests: it holds the whole score matrix, which training never does.
    """
    q_BD, d_MD = _full_precision(q_BD, d_MD)
    with _exact_products(q_BD):
        scores_BM = q_BD @ d_MD.T / temperature
        if not_negative_BM is not None:
            scores_BM = scores_BM.masked_fill(not_negative_BM, -torch.inf)
        return F.cross_entropy(scores_BM, positive_B, reduction="none")


class LocalLoss(NamedTuple):
    """Result of `contrastive_local_loss`: scalar tensors, so that nothing waits for the device."""

    value: Tensor
    """Weighted sum of nats over this rank's anchors; differentiable."""
    masked: Tensor
    """int64: pairs that are no negatives because their texts are equal."""
    negatives: Tensor
    """int64: pairs that are negatives."""
    correct: Tensor
    """int64: anchors whose answer scores above all their negatives."""


def contrastive_local_loss(
    a_BD: Tensor,
    d_MD: Tensor,
    answer_BD: Tensor | None,
    mask: NegativeMask,
    *,
    temperature: float | Tensor,
    weight: float | Tensor,
    tile_bytes: int = TILE_BYTES,
) -> LocalLoss:
    """Sum over anchors of weight * -log p(answer), p = softmax over the answer and the negatives of a.d / temperature.

    a_BD         anchors: unit rows, any float dtype; all arithmetic in fp32 (fp64 stays fp64), whatever autocast says
    d_MD         candidates: unit rows
    answer_BD    the answer to each anchor: unit rows; none: the candidate at mask.positive_index_B
    temperature  positive; a tensor gets a gradient
    weight       of each anchor, () or (B,): 1 / global number of queries
    tile_bytes   memory limit of the scores; changes rounding only
    raises       ValueError where shapes do not match

    The forward computes the gradient tile by tile, while it has the scores; the backward only scales it.
    """
    answers, answer_width = (len(a_BD), d_MD.shape[1]) if answer_BD is None else answer_BD.shape
    if not a_BD.shape[1] == d_MD.shape[1] == answer_width:
        widths = f"{a_BD.shape[1]}, {d_MD.shape[1]}, {answer_width}"
        raise ValueError(f"widths of anchors, candidates and answers differ: {widths}")
    if not len(a_BD) == answers == len(mask.anchor_B):
        raise ValueError(f"{len(a_BD)} anchors, {answers} answers, {len(mask.anchor_B)} anchor hashes")
    if not len(d_MD) == len(mask.candidate_M) == len(mask.owner_M):
        raise ValueError(f"{len(d_MD)} candidates, {len(mask.candidate_M)} hashes, {len(mask.owner_M)} owners")
    if answer_BD is None:
        a_BD, d_MD = _full_precision(a_BD, d_MD)
    else:
        a_BD, d_MD, answer_BD = _full_precision(a_BD, d_MD, answer_BD)
    temperature, weight = _scalar(temperature, a_BD), _scalar(weight, a_BD)
    inputs = (x for x in (a_BD, d_MD, answer_BD, temperature) if x is not None)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.no_grad(), _exact_products(a_BD):
        sums = _TileSums(a_BD, d_MD, answer_BD, mask, temperature, needs_grad, tile_bytes // a_BD.element_size())
        weight_B = weight.expand(len(a_BD))
        for rows_R, mask_equal in _groups(mask):
            for rows_T in _tiles(rows_R, sums.max_rows):
                sums.add(rows_T, weight_B[rows_T], mask_equal)
        negatives = len(a_BD) * max(0, len(d_MD) - 1) - sums.masked - sums.outside
    gradients = sums.gradients() if needs_grad else (None,) * 4
    args = a_BD, d_MD, answer_BD, temperature, sums.value, *gradients
    value = cast(Tensor, _PrecomputedGradients.apply(*args))  # pyright: ignore[reportUnknownMemberType]
    return LocalLoss(value, sums.masked, negatives, sums.correct)


def _groups(mask: NegativeMask) -> Sequence[tuple[Tensor, bool]]:
    """(rows_R, whether equal texts must be looked for) for all anchors: few of them have duplicates.

    On a GPU the host would have to wait for their number, so all anchors are compared there.
    """
    if not can_read(mask.anchor_B):
        return [(torch.arange(len(mask.anchor_B), device=mask.anchor_B.device), True)]
    has_duplicates_B = mask.has_duplicates()
    return [((~has_duplicates_B).nonzero()[:, 0], False), (has_duplicates_B.nonzero()[:, 0], True)]


class _TileSums:
    """Loss, counts and gradients, summed over tiles of anchors x candidates.

    A tile has all candidates where the memory suffices for LEAST_ROWS anchors or all that there are. Otherwise it is
    about square, and the scores of a row of tiles are computed twice: for their maximum and sum, then for the gradient.
    """

    def __init__(
        self,
        a_BD: Tensor,
        d_MD: Tensor,
        answer_BD: Tensor | None,
        mask: NegativeMask,
        temperature: Tensor,
        needs_grad: bool,
        max_scores: int,
    ) -> None:
        self.a_BD, self.d_MD, self.mask = a_BD.detach(), d_MD.detach(), mask
        self.answer_BD = None if answer_BD is None else answer_BD.detach()
        self.temperature, self.needs_grad = temperature.detach(), needs_grad
        if needs_grad:
            self.da_BD, self.dd_MD = torch.zeros_like(self.a_BD), torch.zeros_like(self.d_MD)
            self.danswer_BD = None if answer_BD is None else torch.zeros_like(answer_BD)
        self.value = a_BD.new_zeros(())
        self.masked, self.outside, self.correct = a_BD.new_zeros(3, dtype=torch.int64)
        rows = max_scores // max(1, len(d_MD))
        if rows < min(LEAST_ROWS, len(a_BD)):
            rows = max(1, math.isqrt(max_scores))
        elif a_BD.is_cpu:
            rows = min(rows, MOST_ROWS_ON_CPU)
        self.max_rows, self.max_scores = rows, max(rows, max_scores)
        self.buffer = a_BD.new_empty(0)

    def add(self, rows_T: Tensor, weight_T: Tensor, mask_equal: bool) -> None:
        """Add a row of tiles: nats = softplus(x), x = logsumexp(negatives) - answer.

        This form stays exact where p(answer) rounds to 1, and so does its gradient: the softmax over the negatives,
        times sigmoid(x) = 1 - p(answer).
        """
        a_TD = self.a_BD[rows_T] / self.temperature
        index_T = self.mask.positive_index_B[rows_T]
        answer_TD = self.d_MD[index_T] if self.answer_BD is None else self.answer_BD[rows_T]
        answer_score_T = (a_TD * answer_TD).sum(1)
        # With this start and the clamp an anchor without negatives gives 0 nats and no gradient.
        max_T = answer_score_T.new_full((len(rows_T),), torch.finfo(answer_score_T.dtype).min)
        sum_T = torch.zeros_like(max_T)
        width = self.max_scores // len(rows_T)
        tiles = [slice(start, start + width) for start in range(0, len(self.d_MD), width)]
        exp_TC = sum_T[:, None]
        for tile in tiles:
            scores_TC = self._negative_scores(a_TD, rows_T, tile, mask_equal, count=True)
            previous_T, max_T = max_T, torch.maximum(max_T, scores_TC.amax(1))
            exp_TC = scores_TC.sub_(max_T[:, None]).exp_()
            sum_T.mul_((previous_T - max_T).exp_()).add_(exp_TC.sum(1))
        self.correct += (answer_score_T > max_T).count_nonzero()
        sum_T.clamp_(min=1.0)
        x_T = max_T + sum_T.log() - answer_score_T
        self.value += weight_T @ -F.logsigmoid(-x_T)
        if not self.needs_grad:
            return
        # exp_TC stays unnormalised: its factor is constant along a row, so it multiplies the smaller (T, D) side.
        loss_T1 = (weight_T * x_T.sigmoid())[:, None]
        scale_T1 = loss_T1 / sum_T[:, None]
        scaled_TD, da_TD = a_TD * scale_T1, torch.zeros_like(a_TD)
        for tile in reversed(tiles):
            if tile is not tiles[-1]:  # the last tile's are still there
                exp_TC = self._negative_scores(a_TD, rows_T, tile, mask_equal).sub_(max_T[:, None]).exp_()
            da_TD.addmm_(exp_TC, self.d_MD[tile])
            self.dd_MD[tile].addmm_(exp_TC.T, scaled_TD)
        self.da_BD[rows_T] = da_TD.mul_(scale_T1).sub_(answer_TD * loss_T1).div_(self.temperature)
        danswer_TD = a_TD.mul_(-loss_T1)
        if self.danswer_BD is None:
            self.dd_MD.index_add_(0, index_T, danswer_TD)
        else:
            self.danswer_BD[rows_T] = danswer_TD

    def _negative_scores(
        self, a_TD: Tensor, rows_T: Tensor, tile: slice, mask_equal: bool, *, count: bool = False
    ) -> Tensor:
        """(T, C) scores of a tile, -inf for pairs that are no negatives; the next call overwrites them."""
        d_CD, mask = self.d_MD[tile], self.mask
        scores_TC = torch.mm(a_TD, d_CD.T, out=self._buffer(len(a_TD), len(d_CD)))
        outside_TC = mask.outside(rows_T, tile) if mask.in_row_only else None
        equal_TC = mask.equal(rows_T, tile) if mask_equal else None
        if equal_TC is not None and outside_TC is not None:
            equal_TC &= ~outside_TC
        for excluded_TC, counter in ((outside_TC, self.outside), (equal_TC, self.masked)):
            if excluded_TC is not None:
                scores_TC.masked_fill_(excluded_TC, -torch.inf)
                if count:
                    counter += excluded_TC.count_nonzero()
        return mask.fill_positive(scores_TC, rows_T, tile, -torch.inf)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """By anchors, candidates, answers and temperature; the last follows from da: scores go with 1 / temperature."""
        return self.da_BD, self.dd_MD, self.danswer_BD, -(self.a_BD * self.da_BD).sum() / self.temperature

    def _buffer(self, rows: int, columns: int) -> Tensor:
        """(rows, columns): the same memory for every tile, because new memory of this size costs page faults."""
        if self.buffer.numel() < rows * columns:
            self.buffer = self.buffer.new_empty(0)  # free it before allocating more
            self.buffer = self.buffer.new_empty(rows * columns)
        return self.buffer[: rows * columns].view(rows, columns)


class _PrecomputedGradients(torch.autograd.Function):
    """(four tensors or none, value, their gradients) -> the value, whose backward scales the gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[5:])
        return args[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.saved_tensors
        if not (can_read(grad_output) and grad_output == 1):  # a copy of all gradients
            grads = [None if grad is None else grad * grad_output for grad in grads]
        pairs = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if needed else None for grad, needed in pairs), None, None, None, None, None)


def distillation_local_loss(
    q_BD: Tensor,
    group_BGD: Tensor,
    teacher_BG: Tensor,
    *,
    temperature: float | Tensor,
    weight: float | Tensor,
    valid_BG: Tensor | None = None,
) -> Tensor:
    """Sum over queries of weight * KL(softmax of teacher scores || softmax of q.d / temperature), over own passages.

    q_BD, group_BGD   unit rows, any float dtype; arithmetic in fp32 (fp64 stays fp64)
    teacher_BG        the teacher's scores, NaN where there is none; a row of NaN adds nothing
    weight            of each query, () or (B,)
    valid_BG          bool, false where a query has fewer passages; none: all are valid
    returns           () nats

    The teacher's scores are not divided by the temperature, as in FlagEmbedding's `kl_div`, which has this gradient.
    """
    q_BD, group_BGD = _full_precision(q_BD, group_BGD)
    with _exact_products(q_BD):
        scores_BG = (q_BD[:, None] * group_BGD).sum(2) / temperature  # no product that TF32 reaches in the backward
        valid_BG = ~teacher_BG.isnan() if valid_BG is None else valid_BG & ~teacher_BG.isnan()
        lowest = torch.finfo(scores_BG.dtype).min  # not -inf: a row without valid passages would give NaN
        teacher_BG = teacher_BG.to(scores_BG.dtype).masked_fill(~valid_BG, lowest).log_softmax(1)
        student_BG = scores_BG.masked_fill(~valid_BG, lowest).log_softmax(1)
        nats_BG = (teacher_BG.exp() * (teacher_BG - student_BG)).masked_fill(~valid_BG, 0.0)
        return (weight * nats_BG.sum(1)).sum()


def matryoshka(x_ND: Tensor, width: int) -> Tensor:
    """(N, D) unit rows -> (N, width) unit rows: the first dimensions, normalised again; at the full width x_ND itself.

    Kusupati et al. 2022, "Matryoshka representation learning", section 3. Raises ValueError for any other width.
    """
    if not 0 < width <= x_ND.shape[1]:
        raise ValueError(f"width {width} is not one of 1 to {x_ND.shape[1]}")
    return x_ND if width == x_ND.shape[1] else F.normalize(x_ND[:, :width], dim=1)


def _scalar(x: float | Tensor, like: Tensor) -> Tensor:
    """A tensor of the type and on the device of `like`; filled there, because a copy would make the host wait."""
    return x.to(like) if isinstance(x, Tensor) else like.new_full((), x)


def _full_precision(*tensors: Tensor) -> list[Tensor]:
    """All in fp64 if one of them is, else in fp32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


@contextmanager
def _exact_products(x: Tensor) -> Generator[None]:
    """Products as the factors' type says, whatever autocast and TF32 say outside."""
    with torch.autocast(x.device.type, enabled=False), tf32(False):
        yield


def _tiles(rows_R: Tensor, max_rows: int) -> Sequence[Tensor]:
    """The fewest, nearly equal parts of at most `max_rows` rows; no rows give no tile."""
    return rows_R.tensor_split(-(-len(rows_R) // max_rows)) if len(rows_R) else ()
