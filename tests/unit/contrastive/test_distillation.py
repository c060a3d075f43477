"""Distillation and Matryoshka widths. Shape suffixes: B queries, G passages of a query's own row, N texts, D width."""

import pytest
import torch
from torch import Tensor

from contrastive.loss import distillation_local_loss, matryoshka
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
