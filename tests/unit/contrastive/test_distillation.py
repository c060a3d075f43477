"""Distillation and Matryoshka widths. Shape suffixes: B queries, G passages of a query's own row, N texts, D width."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive.config import LossConfig
from contrastive.loss import distillation_local_loss, matryoshka
from contrastive.stage import FinetuneStage
from lodestar.distributed.testing import run_world
from tests.step_batches import step_batch
from tests.unit.contrastive.problems import TIGHT, D, gradients, unit

NAN = float("nan")
TEACHER_BG = torch.tensor([[3.0, 1.0, -2.0], [NAN, NAN, NAN], [0.5, 0.1, NAN], [2.0, 2.5, 9.0]], dtype=torch.float64)
VALID_BG = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]).bool()


def kl_by_loops(q_BD: Tensor, group_BGD: Tensor, temperature: float) -> Tensor:
    total = q_BD.new_zeros(())
    for q_D, group_GD, teacher_G, valid_G in zip(q_BD, group_BGD, TEACHER_BG, VALID_BG, strict=True):
        places = [g for g in range(3) if valid_G[g] and not teacher_G[g].isnan()]
        if not places:
            continue
        student = [(q_D @ group_GD[g] / temperature).exp() for g in places]
        teacher = [teacher_G[g].exp() for g in places]
        for s, t in zip(student, teacher, strict=True):
            p = t / sum(teacher)
            total = total + p * (p / (s / sum(student))).log()
    return total


def test_distillation_is_the_divergence_from_the_teacher_over_each_row():
    q_BD, group_BGD = unit(4, D, seed=0).requires_grad_(), unit(4, 3, D, seed=1).requires_grad_()

    def local_loss(q_BD: Tensor, group_BGD: Tensor) -> Tensor:
        return distillation_local_loss(q_BD, group_BGD, TEACHER_BG, temperature=0.2, weight=0.25, valid_BG=VALID_BG)

    reference = gradients(0.25 * kl_by_loops(q_BD, group_BGD, 0.2), q_BD, group_BGD)
    actual = gradients(local_loss(q_BD, group_BGD), q_BD, group_BGD)
    torch.testing.assert_close(actual, reference, **TIGHT)
    assert not actual[1][1].any() and not actual[2][1].any()  # the row without a teacher
    assert torch.autograd.gradcheck(local_loss, (q_BD, group_BGD))


def test_distillation_is_zero_where_the_student_agrees_or_without_a_teacher():
    q_BD, group_BGD = unit(4, D, seed=0), unit(4, 3, D, seed=1)
    scores_BG = torch.einsum("bd,bgd->bg", q_BD, group_BGD) / 0.2
    assert distillation_local_loss(q_BD, group_BGD, scores_BG, temperature=0.2, weight=1.0).abs() < 1e-14
    none_BG = torch.full((4, 3), NAN)
    assert distillation_local_loss(q_BD, group_BGD, none_BG, temperature=0.2, weight=1.0) == 0
    assert distillation_local_loss(q_BD[:0], group_BGD[:0], none_BG[:0], temperature=0.2, weight=1.0) == 0


def test_distillation_weights_rows_and_stays_in_fp32_under_autocast():
    q_BD, group_BGD = unit(4, D, seed=0), unit(4, 3, D, seed=1)
    weight_B = torch.tensor([1.0, 2.0, 0.0, 0.0])
    expected = distillation_local_loss(q_BD[:1], group_BGD[:1], TEACHER_BG[:1], temperature=0.01, weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = distillation_local_loss(q_BD.float(), group_BGD.float(), TEACHER_BG, temperature=0.01, weight=weight_B)
    # fp32 scores carry 6e-8 / 0.01
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=0.0)


# --- matryoshka ------------------------------------------------------------------------------


def test_matryoshka_keeps_the_first_numbers_as_a_unit_row():
    x_ND = unit(4, D, seed=0).requires_grad_()
    short_Nd = matryoshka(x_ND, 3)
    torch.testing.assert_close(short_Nd, x_ND[:, :3] / x_ND[:, :3].norm(dim=1, keepdim=True), **TIGHT)
    torch.testing.assert_close(short_Nd.norm(dim=1), torch.ones(4, dtype=torch.float64), **TIGHT)
    assert torch.autograd.gradcheck(lambda x_ND: matryoshka(x_ND, 3), x_ND)
    assert matryoshka(x_ND, D) is x_ND


@pytest.mark.parametrize("width", [0, D + 1])
def test_a_width_beyond_the_embedding_is_an_error(width: int):
    with pytest.raises(ValueError, match=f"width {width} is not one of 1 to {D}"):
        matryoshka(unit(4, D, seed=0), width)


# --- both together ---------------------------------------------------------------------------


B, G, WIDTHS, WEIGHT = 6, 3, (2, 3), 0.7


def teacher_and_texts() -> tuple[Tensor, Tensor, Tensor]:
    """(B, G) scores, (B, D) queries and (B * G, D) passages as the encoder pools them, not normalised."""
    generator = torch.Generator().manual_seed(4)
    teacher_BG, q_BD, p_MD = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, G), (B, D), (B * G, D))
    )
    return 3 * teacher_BG, q_BD.requires_grad_(), p_MD.requires_grad_()


def local_step(rank: int, size: int) -> list[Tensor]:
    """This rank's part of the loss, and its gradient for this rank's queries and passages."""
    teacher_BG, q_BD, p_MD = teacher_and_texts()
    queries = range(rank * B // size, (rank + 1) * B // size)
    passages = range(queries.start * G, queries.stop * G)
    count = len(queries)
    counts = [(r + 1) * B // size - r * B // size for r in range(size)]
    batch = step_batch(rank, counts, teacher_BG[queries.start : queries.stop], [])
    loss = LossConfig(distillation=WEIGHT, matryoshka=list(WIDTHS))
    stage = FinetuneStage(
        loss=loss, global_size=B, seed=0, device=torch.device("cpu"), max_length=8, keep_graph=0, memory_bytes=0
    )
    x_ND = torch.cat([q_BD[queries.start : queries.stop], p_MD[passages.start : passages.stop]]).detach()
    x_ND.requires_grad_()
    value, grad_ND = gradients(stage._scalars(batch, F.normalize(x_ND, dim=1), 0.2)["loss"], x_ND)
    return [value, grad_ND[:count], grad_ND[count:]]


def as_flagembedding(distilled_widths: Sequence[int]) -> list[Tensor]:
    """The mean over widths of cross-entropy with the teacher plus contrastive loss; its gradients.

    As BiEncoderOnlyEmbedderModel 1.4 with `use_mrl` and `kl_div`, less the teacher's entropy, which is a constant.
    """
    teacher_BG, q_BD, p_MD = teacher_and_texts()
    target_BG, losses = teacher_BG.softmax(1), []
    index_BG = torch.arange(B * G).view(B, G)
    for width in (D, *WIDTHS):
        scores_BM = F.normalize(q_BD[:, :width], dim=1) @ F.normalize(p_MD[:, :width], dim=1).T / 0.2
        losses.append(F.cross_entropy(scores_BM, index_BG[:, 0]))
        if width in distilled_widths:
            cross_entropy = -(scores_BM.gather(1, index_BG).log_softmax(1) * target_BG).sum(1).mean()
            entropy = -(target_BG * target_BG.log()).sum(1).mean()
            losses[-1] = losses[-1] + WEIGHT * (cross_entropy - entropy)
    return gradients(torch.stack(losses).mean(), q_BD, p_MD)


@pytest.mark.parametrize("size", [1, 2])
def test_each_matryoshka_width_is_distilled_as_by_flagembedding(size: int):
    values, *grads = zip(*run_world(local_step, size), strict=True)
    actual = [torch.stack(values).sum(), *map(torch.cat, grads)]
    torch.testing.assert_close(actual, as_flagembedding((D, *WIDTHS)), **TIGHT)
    at_full_width_only = as_flagembedding((D,))
    assert all((a - b).norm() > 0.01 * b.norm() for a, b in zip(actual, at_full_width_only, strict=True))
