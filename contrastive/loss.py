"""The losses of fine-tuning. Tensor arithmetic only: no ranks, no model, no logging.

InfoNCE: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", equation 4.
An anchor is pulled to its answer and pushed from candidates: a query to its passage, from all other passages.
Shape suffixes: B anchors on this rank, M candidates (of all ranks), D embedding width, G passages of a query's own row,
T anchors of a tile, N texts, R anchors with the same masking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive.config import TILE_BYTES
from contrastive.negatives import NegativeMask


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
    with _no_autocast(q_BD):
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
    answer_BD: Tensor,
    mask: NegativeMask,
    *,
    temperature: float | Tensor,
    weight: float | Tensor,
    tile_bytes: int = TILE_BYTES,
) -> LocalLoss:
    """Sum over anchors of weight * -log p(answer), p = softmax over the answer and the negatives of a.d / temperature.

    a_BD         anchors: unit rows, any float dtype; all arithmetic in fp32 (fp64 stays fp64), whatever autocast says
    d_MD         candidates: unit rows
    answer_BD    the answer to each anchor: unit rows, among the candidates or not
    temperature  positive; a tensor gets a gradient
    weight       of each anchor, () or (B,): 1 / global number of queries
    tile_bytes   memory limit of the scores; changes rounding only
    raises       ValueError where shapes do not match

    The forward computes the gradient tile by tile, while it has the scores; the backward only scales it.
    """
    if not a_BD.shape[1] == d_MD.shape[1] == answer_BD.shape[1]:
        widths = f"{a_BD.shape[1]}, {d_MD.shape[1]}, {answer_BD.shape[1]}"
        raise ValueError(f"widths of anchors, candidates and answers differ: {widths}")
    if not len(a_BD) == len(answer_BD) == len(mask.anchor_B):
        raise ValueError(f"{len(a_BD)} anchors, {len(answer_BD)} answers, {len(mask.anchor_B)} anchor hashes")
    if not len(d_MD) == len(mask.candidate_M) == len(mask.owner_M):
        raise ValueError(f"{len(d_MD)} candidates, {len(mask.candidate_M)} hashes, {len(mask.owner_M)} owners")
    a_BD, d_MD, answer_BD = _full_precision(a_BD, d_MD, answer_BD)
    temperature = torch.as_tensor(temperature, dtype=a_BD.dtype, device=a_BD.device)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (a_BD, d_MD, answer_BD, temperature))
    with torch.no_grad(), _no_autocast(a_BD):
        sums = _TileSums(a_BD, d_MD, answer_BD, temperature, needs_grad)
        weight_B = torch.as_tensor(weight, dtype=a_BD.dtype, device=a_BD.device).expand(len(a_BD))
        tile_rows = max(1, tile_bytes // max(1, len(d_MD) * a_BD.element_size()))
        # Anchors that need masks get tiles of their own, so that the others skip the comparisons.
        has_duplicates_B, in_row_only_B = mask.has_duplicates(), mask.in_row_only_B
        for in_group_B, mask_equal, mask_outside in (
            (~has_duplicates_B & ~in_row_only_B, False, False),
            (has_duplicates_B & ~in_row_only_B, True, False),
            (in_row_only_B, True, True),
        ):
            for rows_T in _tiles(in_group_B.nonzero()[:, 0], tile_rows):
                equal_TM = mask.equal(rows_T) if mask_equal else None
                outside_TM = mask.outside(rows_T) if mask_outside else None
                sums.add(rows_T, mask.positive_index_B[rows_T], weight_B[rows_T], equal_TM, outside_TM)
        negatives = len(a_BD) * max(0, len(d_MD) - 1) - sums.masked - sums.outside
    gradients = sums.gradients() if needs_grad else (None,) * 4
    args = a_BD, d_MD, answer_BD, temperature, sums.value, *gradients
    value = cast(Tensor, _PrecomputedGradients.apply(*args))  # pyright: ignore[reportUnknownMemberType]
    return LocalLoss(value, sums.masked, negatives, sums.correct)


class _TileSums:
    """Loss, counts and gradients, summed over tiles of anchors x all candidates."""

    def __init__(self, a_BD: Tensor, d_MD: Tensor, answer_BD: Tensor, temperature: Tensor, needs_grad: bool) -> None:
        self.a_BD, self.d_MD, self.answer_BD = a_BD.detach(), d_MD.detach(), answer_BD.detach()
        self.temperature, self.needs_grad = temperature.detach(), needs_grad
        if needs_grad:
            self.da_BD, self.dd_MD, self.danswer_BD = map(torch.zeros_like, (self.a_BD, self.d_MD, self.answer_BD))
        self.value = a_BD.new_zeros(())
        self.masked, self.outside, self.correct = a_BD.new_zeros(3, dtype=torch.int64)
        self.buffer = a_BD.new_empty(0)

    def add(
        self,
        rows_T: Tensor,
        positive_index_T: Tensor,
        weight_T: Tensor,
        equal_TM: Tensor | None,
        outside_TM: Tensor | None,
    ) -> None:
        """Add one tile: nats = softplus(x), x = logsumexp(negatives) - answer.

        This form stays exact where p(answer) rounds to 1, and so does its gradient: the softmax over the negatives,
        times sigmoid(x) = 1 - p(answer).
        """
        a_TD = self.a_BD[rows_T] / self.temperature
        answer_TD = self.answer_BD[rows_T]
        answer_score_T = (a_TD * answer_TD).sum(1)
        scores_TM = torch.mm(a_TD, self.d_MD.T, out=self._scores(len(rows_T)))
        if outside_TM is not None:
            self.outside += outside_TM.count_nonzero()
            scores_TM.masked_fill_(outside_TM, -torch.inf)
        if equal_TM is not None:
            equal_TM = equal_TM if outside_TM is None else equal_TM & ~outside_TM
            self.masked += equal_TM.count_nonzero()
            scores_TM.masked_fill_(equal_TM, -torch.inf)
        scores_TM.scatter_(1, positive_index_T[:, None], -torch.inf)
        # With the clamps an anchor without negatives gives 0 nats and no gradient.
        max_T = scores_TM.amax(1).clamp_(min=torch.finfo(scores_TM.dtype).min)
        self.correct += (answer_score_T > max_T).count_nonzero()
        exp_TM = scores_TM.sub_(max_T[:, None]).exp_()
        sum_T = exp_TM.sum(1).clamp_(min=1.0)
        x_T = max_T + sum_T.log() - answer_score_T
        self.value += weight_T @ -F.logsigmoid(-x_T)
        if not self.needs_grad:
            return
        # exp_TM stays unnormalised: its factor is constant along a row, so it multiplies the smaller (T, D) side.
        loss_T1 = (weight_T * x_T.sigmoid())[:, None]
        scale_T1 = loss_T1 / sum_T[:, None]
        da_TD = (exp_TM @ self.d_MD).mul_(scale_T1).sub_(answer_TD * loss_T1)
        self.da_BD[rows_T] = da_TD.div_(self.temperature)
        self.danswer_BD[rows_T] = -a_TD * loss_T1
        self.dd_MD.addmm_(exp_TM.T, a_TD.mul_(scale_T1))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By anchors, candidates, answers and temperature; the last follows from da: scores go with 1 / temperature."""
        return self.da_BD, self.dd_MD, self.danswer_BD, -(self.a_BD * self.da_BD).sum() / self.temperature

    def _scores(self, rows: int) -> Tensor:
        """(rows, M): the same memory for every tile, because new memory of this size costs page faults."""
        if self.buffer.numel() < rows * len(self.d_MD):
            self.buffer = self.buffer.new_empty(0)  # free it before allocating more
            self.buffer = self.buffer.new_empty(rows * len(self.d_MD))
        return self.buffer[: rows * len(self.d_MD)].view(rows, len(self.d_MD))


class _PrecomputedGradients(torch.autograd.Function):
    """(four tensors, value, four gradients) -> the value, whose backward scales the gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[5:])
        return args[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return (*(grad * grad_output if needed else None for grad, needed in pairs), None, None, None, None, None)


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
    with _no_autocast(q_BD):
        scores_BG = torch.einsum("bd,bgd->bg", q_BD, group_BGD) / temperature
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


def _full_precision(*tensors: Tensor) -> list[Tensor]:
    """All in fp64 if one of them is, else in fp32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _tiles(rows_R: Tensor, max_rows: int) -> Sequence[Tensor]:
    """The fewest, nearly equal parts of at most `max_rows` rows; no rows give no tile."""
    return rows_R.tensor_split(-(-len(rows_R) // max_rows)) if len(rows_R) else ()
