"""Equal texts are no negatives, and neither are texts of other rows where the recipe says so.

Shape suffixes: B queries, M passages, D width.
"""

from dataclasses import replace

import pytest
import torch

from contrastive.negatives import NegativeMask
from tests.unit.contrastive.problems import (
    TIGHT,
    B,
    D,
    M,
    by_reference,
    by_tiles,
    distinct,
    not_negative_by_loops,
    problem,
    query_to_passage_loss,
    with_equal_texts,
)


@pytest.mark.parametrize("rules", ["p", "s", "q", "psq"])
def test_equal_texts_are_no_negatives(rules: str):
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B, rules)
    not_negative_BM = not_negative_by_loops(mask)
    assert not_negative_BM.any() and torch.equal(mask.not_negative(), not_negative_BM)
    assert torch.equal(mask.has_duplicates(), not_negative_BM.any(1))
    actual = by_tiles(q_BD, d_MD, mask)
    torch.testing.assert_close(actual, by_reference(q_BD, d_MD, positive_B, not_negative_BM), **TIGHT)
    # negative control: without the rule all three differ by far more than rounding
    for with_rule, without in zip(actual, by_tiles(q_BD, d_MD, distinct(positive_B)), strict=True):
        assert (with_rule - without).abs().max() > 1e-6


def test_random_collisions_are_masked_as_by_loops():
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        positive_B = torch.randperm(M, generator=draw)[:B]
        start_B = (positive_B - 1).clamp(min=0)
        mask = NegativeMask(
            anchor_B=torch.randint(0, 30, (B,), generator=draw),
            answer_B=torch.randint(0, 30, (B,), generator=draw),
            same_query_B=torch.randint(0, 30, (B,), generator=draw),
            candidate_M=torch.randint(0, 30, (M,), generator=draw),
            owner_M=torch.randint(-1, 30, (M,), generator=draw),
            positive_index_B=positive_B,
            in_row_only=seed % 3 == 0,
            start_B=start_B,
            end_B=start_B + 4,
        )
        not_negative_BM = not_negative_by_loops(mask)
        assert torch.equal(mask.not_negative(), not_negative_BM)
        q_BD, d_MD, _ = problem(seed)
        reference = by_reference(q_BD, d_MD, positive_B, not_negative_BM)
        torch.testing.assert_close(by_tiles(q_BD, d_MD, mask), reference, **TIGHT)


def test_queries_without_in_batch_negatives_see_only_their_own_passages():
    q_BD, d_MD, positive_B = problem()
    mask = replace(distinct(positive_B), in_row_only=True, start_B=positive_B, end_B=positive_B + 2)
    not_negative_BM = not_negative_by_loops(mask)
    assert not_negative_BM.sum(1).tolist() == [M - 2] * B
    actual = by_tiles(q_BD, d_MD, mask)
    torch.testing.assert_close(actual, by_reference(q_BD, d_MD, positive_B, not_negative_BM), **TIGHT)
    assert not torch.allclose(actual[1], by_tiles(q_BD, d_MD, distinct(positive_B))[1])


@pytest.mark.parametrize(("in_row_only", "masked"), [(False, 2 + 2 + 1 + 2), (True, 1 + 1)])
def test_pairs_are_counted(in_row_only: bool, masked: int):
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B)
    mask = replace(mask, in_row_only=in_row_only, start_B=positive_B, end_B=positive_B + 2)
    not_negative_BM = not_negative_by_loops(mask)
    scores_BM = (q_BD @ d_MD.T).masked_fill(not_negative_BM, -torch.inf)
    local_loss = query_to_passage_loss(q_BD, d_MD, mask, temperature=0.1, weight=1 / B, tile_bytes=400)
    # by hand: 1 and 4 see their positive's text twice, 2 sees itself, 3 and 5 see each other's positives; in their own
    # rows are only the copy beside 1's positive, and 2 itself
    assert local_loss.masked == masked
    assert local_loss.negatives == B * (M - 1) - (not_negative_BM.sum())
    assert local_loss.correct == (scores_BM.argmax(1) == positive_B).sum()
    assert not any(count.requires_grad for count in local_loss[1:])


def test_a_collapsed_model_is_never_right():
    local_loss = query_to_passage_loss(
        torch.ones(B, D), torch.ones(M, D), distinct(torch.arange(B)), temperature=0.01, weight=1.0
    )
    assert local_loss.correct == 0
