"""The losses of fine-tuning. Tensor arithmetic only: no ranks, no model, no logging.

InfoNCE: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", equation 4.
An anchor is drawn to its answer and away from candidates: a query to its passage, away from all passages.
Shape suffixes: B anchors on this rank, M candidates (of all ranks), D embedding width, G passages of a query's own row,
T anchors of a tile, N any texts, R positions of anchors that are treated alike.
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

    q_BD, d_MD   unit rows, any float dtype; the product is taken in fp32 (fp64 stays fp64)
    positive_B   int64, the row of d_MD that answers each query
    not_negative_BM    bool, pairs that are no negatives; false at the positives
    returns      (B,) nats; the caller divides by the *global* number of queries

    The plain form that tests compare with: it holds all scores, which training never does.
    """
    q_BD, d_MD = _exact(q_BD, d_MD)
    with _no_autocast(q_BD):
        scores_BM = q_BD @ d_MD.T / temperature
        if not_negative_BM is not None:
            scores_BM = scores_BM.masked_fill(not_negative_BM, -torch.inf)
        return F.cross_entropy(scores_BM, positive_B, reduction="none")


class LocalLoss(NamedTuple):
    """What `contrastive_local_loss` found; all scalar tensors, so that nothing waits for the device."""

    value: Tensor
    """Weighted sum of nats over this rank's anchors; differentiable."""
    masked: Tensor
    """int64: pairs that are no negatives because their texts are equal."""
    negatives: Tensor
    """int64: pairs that are negatives."""
    correct: Tensor
    """int64: anchors whose answer scored above all their negatives."""


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
    answer_BD    what answers each anchor: unit rows, of the candidates or not
    temperature  positive; a tensor gets a gradient
    weight       of each anchor, () or (B,): 1 / global number of queries
    tile_bytes   the most that scores may take; changes rounding only
    raises       ValueError where shapes do not fit together

    The gradient is known as soon as a tile's scores are, so the forward takes it and the backward only scales it.
    """
    if not a_BD.shape[1] == d_MD.shape[1] == answer_BD.shape[1]:
        widths = f"{a_BD.shape[1]}, {d_MD.shape[1]}, {answer_BD.shape[1]}"
        raise ValueError(f"widths of anchors, candidates and answers differ: {widths}")
    if not len(a_BD) == len(answer_BD) == len(mask.anchor_B):
        raise ValueError(f"{len(a_BD)} anchors, {len(answer_BD)} answers, {len(mask.anchor_B)} anchor hashes")
    if not len(d_MD) == len(mask.candidate_M) == len(mask.owner_M):
        raise ValueError(f"{len(d_MD)} candidates, {len(mask.candidate_M)} hashes, {len(mask.owner_M)} owners")
    a_BD, d_MD, answer_BD = _exact(a_BD, d_MD, answer_BD)
    temperature = torch.as_tensor(temperature, dtype=a_BD.dtype, device=a_BD.device)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (a_BD, d_MD, answer_BD, temperature))
    with torch.no_grad(), _no_autocast(a_BD):
        run = _Sums(a_BD, d_MD, answer_BD, temperature, wants)
        weight_B = torch.as_tensor(weight, dtype=a_BD.dtype, device=a_BD.device).expand(len(a_BD))
        rows = max(1, tile_bytes // max(1, len(d_MD) * a_BD.element_size()))
        # Anchors that need masks come in tiles of their own: only they pay for the comparisons.
        has_duplicates_B, in_row_only_B = mask.has_duplicates(), mask.in_row_only_B
        for chosen_B, equal, outside in (
            (~has_duplicates_B & ~in_row_only_B, False, False),
            (has_duplicates_B & ~in_row_only_B, True, False),
            (in_row_only_B, True, True),
        ):
            for rows_T in _tiles(chosen_B.nonzero()[:, 0], rows):
                equal_TM = mask.equal(rows_T) if equal else None
                outside_TM = mask.outside(rows_T) if outside else None
                run.add(rows_T, mask.positive_index_B[rows_T], weight_B[rows_T], equal_TM, outside_TM)
        negatives = len(a_BD) * max(0, len(d_MD) - 1) - run.masked - run.outside
    gradients = run.gradients() if wants else (None,) * 4
    value = cast(Tensor, _Known.apply(a_BD, d_MD, answer_BD, temperature, run.value, *gradients))  # pyright: ignore[reportUnknownMemberType]
    return LocalLoss(value, run.masked, negatives, run.correct)


class _Sums:
    """Sums over tiles of anchors x all candidates."""

    def __init__(self, a_BD: Tensor, d_MD: Tensor, answer_BD: Tensor, temperature: Tensor, wants: bool) -> None:
        self.a_BD, self.d_MD, self.answer_BD = a_BD.detach(), d_MD.detach(), answer_BD.detach()
        self.temperature, self.wants = temperature.detach(), wants
        if wants:
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
        """nats = softplus(x), x = logsumexp(negatives) - answer: exact also where the answer wins by far, and with it
        the gradient, whose softmax over the negatives is multiplied by sigmoid(x) = 1 - p(answer)."""
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
        # The clamps let an anchor without any negative through: 0 nats, no gradient.
        most_T = scores_TM.amax(1).clamp_(min=torch.finfo(scores_TM.dtype).min)
        self.correct += (answer_score_T > most_T).count_nonzero()
        powers_TM = scores_TM.sub_(most_T[:, None]).exp_()
        total_T = powers_TM.sum(1).clamp_(min=1.0)
        x_T = most_T + total_T.log() - answer_score_T
        self.value += weight_T @ -F.logsigmoid(-x_T)
        if not self.wants:
            return
        # The powers stay as they are: what they lack is the same along a row, and multiplies the narrow side.
        loss_T1 = (weight_T * x_T.sigmoid())[:, None]
        scale_T1 = loss_T1 / total_T[:, None]
        da_TD = (powers_TM @ self.d_MD).mul_(scale_T1).sub_(answer_TD * loss_T1)
        self.da_BD[rows_T] = da_TD.div_(self.temperature)
        self.danswer_BD[rows_T] = -a_TD * loss_T1
        self.dd_MD.addmm_(powers_TM.T, a_TD.mul_(scale_T1))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of anchors, candidates, answers and temperature; scores go as 1 / temperature, so da tells the last."""
        return self.da_BD, self.dd_MD, self.danswer_BD, -(self.a_BD * self.da_BD).sum() / self.temperature

    def _scores(self, rows: int) -> Tensor:
        """The same memory for every tile: fresh memory of this size costs page faults."""
        if self.buffer.numel() < rows * len(self.d_MD):
            self.buffer = self.buffer.new_empty(0)  # let go before taking more
            self.buffer = self.buffer.new_empty(rows * len(self.d_MD))
        return self.buffer[: rows * len(self.d_MD)].view(rows, len(self.d_MD))


class _Known(torch.autograd.Function):
    """A value of four tensors, whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        ctx.save_for_backward(*given[5:])
        return given[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return (*(known * upstream if needs else None for known, needs in wanted), None, None, None, None, None)


def distillation_local_loss(
    q_BD: Tensor,
    group_BGD: Tensor,
    teacher_BG: Tensor,
    *,
    temperature: float | Tensor,
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
