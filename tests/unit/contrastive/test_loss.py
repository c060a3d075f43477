"""The tiled contrastive loss against the plain one. Shape suffixes: B queries, M passages, D width."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive import loss
from contrastive.loss import contrastive_local_loss, info_nce
from contrastive.negatives import NegativeMask
from tests.unit.contrastive.problems import (
    TIGHT,
    B,
    D,
    M,
    by_reference,
    by_tiles,
    distinct,
    gradients,
    problem,
    query_to_passage_loss,
    unit,
    with_equal_texts,
)

# --- the plain loss --------------------------------------------------------------------------


def test_two_queries_and_two_passages_by_hand():
    q_BD = torch.eye(2)
    d_MD = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # scores / 0.5: [2.0, 1.2] and [0.0, 1.6]
    by_hand = [math.log(1 + math.exp(1.2 - 2.0)), math.log(1 + math.exp(0.0 - 1.6))]
    nats_B = info_nce(q_BD, d_MD, torch.tensor([0, 1]), temperature=0.5)
    torch.testing.assert_close(nats_B, torch.tensor(by_hand))
    local_loss = query_to_passage_loss(q_BD, d_MD, distinct(torch.arange(2), 2), temperature=0.5, weight=0.5)
    torch.testing.assert_close(local_loss.value, torch.tensor(by_hand).mean())
    assert (local_loss.masked, local_loss.negatives, local_loss.correct) == (0, 2, 2)


def test_equal_scores_give_the_logarithm_of_the_number_of_passages():
    q_BD, d_MD, positive_B = unit(1, D, seed=0).expand(B, D), unit(1, D, seed=0).expand(M, D), torch.arange(B)
    nats_B = info_nce(q_BD, d_MD, positive_B, temperature=0.01)
    torch.testing.assert_close(nats_B, torch.full_like(nats_B, math.log(M)))
    local_loss = query_to_passage_loss(q_BD, d_MD, distinct(positive_B), temperature=0.01, weight=1 / B)
    torch.testing.assert_close(local_loss.value, nats_B.mean())


@pytest.mark.parametrize("tiled", [False, True])
def test_the_order_of_passages_does_not_matter(tiled: bool):
    q_BD, d_MD, positive_B = problem()
    order_M = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    place_M = order_M.argsort()
    mask = with_equal_texts(positive_B)
    candidate_M, owner_M = mask.candidate_M[order_M], mask.owner_M[order_M]
    permuted_mask = replace(mask, candidate_M=candidate_M, owner_M=owner_M, positive_index_B=place_M[positive_B])
    if tiled:
        actual, expected = (
            by_tiles(q_BD, d_MD[order_M], permuted_mask),
            by_tiles(q_BD, d_MD, mask),
        )
    else:
        actual, expected = by_reference(q_BD, d_MD[order_M], place_M[positive_B]), by_reference(q_BD, d_MD, positive_B)
    actual[2] = actual[2][place_M]
    torch.testing.assert_close(actual, expected, **TIGHT)


# --- tiles against the plain loss ------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])  # of 7: alone, an uneven last tile, all at once
@pytest.mark.parametrize("rules", ["", "psq"])
def test_tiles_give_the_plain_loss_and_its_gradients(rows: int, rules: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B, rules)
    reference = by_reference(q_BD, d_MD, positive_B, mask.not_negative())
    torch.testing.assert_close(by_tiles(q_BD, d_MD, mask, rows), reference, **TIGHT)


@pytest.mark.parametrize("scores", [1, 2, 5, 9, 16, 30, 60, 132])  # tiles of 1 x 1, 1 x 2, 2 x 2, ..., the whole
@pytest.mark.parametrize("in_row_only", [False, True])
def test_tiles_of_some_candidates_give_the_plain_loss_and_its_gradients(scores: int, in_row_only: bool):
    q_BD, d_MD, positive_B = problem()
    mask = replace(with_equal_texts(positive_B), in_row_only=in_row_only, start_B=positive_B, end_B=positive_B + 3)
    inputs = q_BD.requires_grad_(), d_MD.requires_grad_()
    weight_B = torch.linspace(0.1, 1.0, B, dtype=torch.float64)
    options = {"temperature": 0.05, "weight": weight_B}
    with Shapes() as shapes:
        tiled = query_to_passage_loss(*inputs, mask, **options, tile_bytes=8 * scores)
    nats_B = info_nce(*inputs, positive_B, temperature=0.05, not_negative_BM=mask.not_negative())
    reference = gradients((weight_B * nats_B).sum(), *inputs)
    torch.testing.assert_close(gradients(tiled.value, *inputs), reference, **TIGHT)
    whole = query_to_passage_loss(*inputs, mask, **options)
    assert tiled[1:] == whole[1:] and tiled.masked > 0
    # Each score is computed at most twice, and none outside a tile.
    assert max(rows * columns for rows, columns in shapes.of_products) <= scores
    assert B * M <= sum(rows * columns for rows, columns in shapes.of_products) < 2 * B * M


@pytest.mark.parametrize("passages", [70, 5000])
def test_scores_are_computed_once_where_a_tile_has_enough_rows(passages: int):
    q_BD, d_MD = unit(200, D, seed=0), unit(passages, D, seed=1)
    with Shapes() as shapes:
        by_tiles(q_BD, d_MD, distinct(torch.arange(200) % 70, passages), rows=loss.LEAST_ROWS)
    assert sum(rows * columns for rows, columns in shapes.of_products) == 200 * passages


@pytest.mark.parametrize("rules", ["", "psq"])
def test_gradients_agree_with_finite_differences(rules: str):
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B, rules)
    weight_B = torch.linspace(0.1, 1.0, B, dtype=torch.float64)

    def plain(q_BD: Tensor, d_MD: Tensor) -> Tensor:
        not_negative_BM = mask.not_negative()
        return (weight_B * info_nce(q_BD, d_MD, positive_B, temperature=0.3, not_negative_BM=not_negative_BM)).sum()

    def tiled(q_BD: Tensor, d_MD: Tensor) -> Tensor:
        # the factor 2 is an upstream gradient that is not 1
        return 2 * query_to_passage_loss(q_BD, d_MD, mask, temperature=0.3, weight=weight_B, tile_bytes=400).value

    inputs = (q_BD.requires_grad_(), d_MD.requires_grad_())
    torch.testing.assert_close(tiled(*inputs), 2 * plain(*inputs), **TIGHT)
    assert torch.autograd.gradcheck(plain, inputs)
    assert torch.autograd.gradcheck(tiled, inputs)


def test_queries_may_be_split_over_ranks_and_their_local_losses_added():
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B)
    value, dq_BD, dd_MD = by_tiles(q_BD, d_MD, mask)
    parts = []
    for part in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)):  # the second has no query
        local_mask = replace(mask, **{n: getattr(mask, n)[part] for n in vars(mask) if n.endswith("_B")})
        q_part, d_part = q_BD[part].clone().requires_grad_(), d_MD.clone().requires_grad_()
        local_loss = query_to_passage_loss(q_part, d_part, local_mask, temperature=0.1, weight=1 / B, tile_bytes=400)
        parts.append(gradients(local_loss.value, q_part, d_part))
    values, dqs, dds = zip(*parts, strict=True)
    torch.testing.assert_close([sum(values), torch.cat(dqs), sum(dds)], [value, dq_BD, dd_MD], **TIGHT)


def test_a_rank_without_queries_adds_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    q_BD, d_MD = torch.zeros(0, D, requires_grad=True), unit(M, D, seed=1, dtype=torch.float32).requires_grad_()
    local_loss = query_to_passage_loss(q_BD, d_MD, distinct(empty), temperature=0.01, weight=1 / B)
    value, dq_BD, dd_MD = gradients(local_loss.value, q_BD, d_MD)
    assert value == 0 and dq_BD.shape == (0, D) and not dd_MD.any()
    assert local_loss.masked == local_loss.negatives == local_loss.correct == 0


def test_no_rank_has_any_row():
    q_BD, empty = torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    local_loss = query_to_passage_loss(q_BD, q_BD[:0], distinct(empty, 0), temperature=0.01, weight=1.0)
    assert local_loss.value == 0 and local_loss.negatives == 0


def test_a_query_without_negatives_has_no_loss():
    q_BD, d_MD = unit(1, D, seed=0, dtype=torch.float32), unit(1, D, seed=1, dtype=torch.float32)
    value, dq_BD, dd_MD = by_tiles(q_BD, d_MD, distinct(torch.tensor([0]), 1), temperature=0.01)
    assert value == 0 and not dq_BD.any() and not dd_MD.any()


def test_only_the_required_gradients_are_computed():
    q_BD, d_MD, positive_B = problem()
    mask = distinct(positive_B)
    both = by_tiles(q_BD, d_MD, mask)
    for leaf, expected in ((q_BD.clone().requires_grad_(), both[1]), (d_MD.clone().requires_grad_(), both[2])):
        pair = (leaf, d_MD) if len(leaf) == B else (q_BD, leaf)
        local_loss = query_to_passage_loss(*pair, mask, temperature=0.1, weight=1 / B)
        torch.testing.assert_close(torch.autograd.grad(local_loss.value, leaf)[0], expected, **TIGHT)
    with torch.no_grad():
        local_loss = query_to_passage_loss(q_BD.requires_grad_(), d_MD, mask, temperature=0.1, weight=1 / B)
    assert not local_loss.value.requires_grad
    torch.testing.assert_close(local_loss.value, both[0], **TIGHT)


# --- answers that are no candidates, and a temperature that is learned -----------------------


def test_answers_need_not_be_candidates():
    """Queries against queries: a query is no negative of itself, and its answer is no candidate."""
    q_BD, answer_BD, positive_index_B = unit(B, D, seed=0), unit(B, D, seed=1), torch.arange(B)
    mask = replace(distinct(positive_index_B, B), owner_M=torch.full((B,), -1))
    inputs = [q_BD.clone().requires_grad_(), answer_BD.clone().requires_grad_()]
    local_loss = contrastive_local_loss(
        inputs[0], inputs[0], inputs[1], mask, temperature=0.1, weight=1.0, tile_bytes=200
    )
    actual = gradients(local_loss.value, *inputs)
    nats = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        answer = inputs[0][i] @ inputs[1][i] / 0.1
        others = [inputs[0][i] @ inputs[0][j] / 0.1 for j in range(B) if j != i]
        nats = nats + torch.stack([answer, *others]).logsumexp(0) - answer
    torch.testing.assert_close(actual, gradients(nats, *inputs), **TIGHT)
    assert local_loss.negatives == B * (B - 1)


def test_answers_that_are_candidates_are_taken_from_there():
    q_BD, d_MD, positive_B = problem()
    mask, options = distinct(positive_B), {"temperature": 0.1, "weight": 1 / B, "tile_bytes": 400}
    leaves = [q_BD.requires_grad_(), d_MD.requires_grad_()]
    actual, expected = (
        gradients(contrastive_local_loss(q_BD, d_MD, answer_BD, mask, **options).value, *leaves)
        for answer_BD in (None, d_MD[positive_B])
    )
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("rules", ["", "psq"])
def test_the_gradient_of_the_temperature_agrees_with_finite_differences(rules: str):
    q_BD, d_MD, positive_B = problem()
    mask = with_equal_texts(positive_B, rules)

    def tiled(temperature: Tensor) -> Tensor:
        return query_to_passage_loss(q_BD, d_MD, mask, temperature=temperature, weight=1 / B, tile_bytes=400).value

    assert torch.autograd.gradcheck(tiled, torch.tensor(0.3, dtype=torch.float64, requires_grad=True))


# --- numbers ---------------------------------------------------------------------------------


def test_cosines_near_one_do_not_overflow_at_a_low_temperature():
    towards_D = unit(1, D, seed=0)
    q_BD = F.normalize(towards_D + 0.01 * unit(B, D, seed=1), dim=1)
    d_MD = F.normalize(towards_D + 0.01 * unit(M, D, seed=2), dim=1)
    positive_B = torch.arange(B)
    assert (q_BD @ d_MD.T).min() > 0.99  # exp(99) is more than fp32 holds
    reference = by_reference(q_BD, d_MD, positive_B, temperature=0.01)
    actual = by_tiles(q_BD.float(), d_MD.float(), distinct(positive_B), temperature=0.01)
    assert all(x.isfinite().all() for x in actual)
    # a cosine of 1 carries 6e-8 in fp32, divided by 0.01 that is 6e-6 of each probability
    torch.testing.assert_close([x.double() for x in actual], reference, rtol=2e-4, atol=2e-5)


def test_a_query_that_is_nearly_right_keeps_an_exact_gradient():
    """p(positive) rounds to 1 in fp32: the plain softmax leaves no gradient, these tiles do."""
    q_BD, positive_B = torch.eye(2, 3), torch.arange(2)
    d_MD = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5]]), dim=1)
    reference = by_reference(q_BD.double(), d_MD.double(), positive_B, temperature=0.02)
    actual = by_tiles(q_BD, d_MD, distinct(positive_B, 3), temperature=0.02)
    plain = by_reference(q_BD, d_MD, positive_B, temperature=0.02)
    assert 0 < reference[0] < 1e-8 and plain[0] == 0
    # relative, for the numbers themselves are tiny; the scores carry 6e-8 / 0.02
    torch.testing.assert_close([x.double() for x in actual], reference, rtol=1e-4, atol=1e-18)
    assert plain[2][0, 0] == 0 > reference[2][0, 0]


def test_bf16_embeddings_are_multiplied_in_fp32_whatever_autocast_says():
    q_BD, d_MD, positive_B = problem()
    q_BD, d_MD, mask = q_BD.bfloat16(), d_MD.bfloat16(), with_equal_texts(positive_B)
    not_negative_BM = mask.not_negative()
    reference = by_reference(q_BD.double(), d_MD.double(), positive_B, not_negative_BM, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        actual = by_tiles(q_BD, d_MD, mask, temperature=0.01)
        plain = by_reference(q_BD, d_MD, positive_B, not_negative_BM, temperature=0.01)
    for value in (actual[0], plain[0]):
        # fp32 scores carry 6e-8 / 0.01; a bf16 product would miss the loss by 1e-2 and more
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference[0], rtol=2e-5, atol=0.0)
    # gradients come back in the inputs' dtype, rounded to its 8 bits; below 1e-4 also the scores' rounding counts
    assert actual[1].dtype == actual[2].dtype == torch.bfloat16
    torch.testing.assert_close([x.double() for x in actual[1:]], reference[1:], rtol=2**-8, atol=1e-4)


class Shapes(TorchDispatchMode):
    """Records the shapes of matrix products that are written into a buffer: the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.of_products: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.out:
            self.of_products.append(tuple(result.shape))
        return result


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("rules", ["", "psq"])
def test_no_more_than_a_tile_of_scores_is_held(rules: str):
    q_BD, d_MD, positive_B = unit(64, D, seed=0), unit(M, D, seed=1), torch.arange(64) % (M - 1)
    owner_M = torch.full((M,), -1)
    zero_B = torch.zeros(64, dtype=torch.int64)
    texts_M = torch.arange(M) // 2 if rules else torch.arange(M)
    mask = NegativeMask(
        anchor_B=1000 + torch.arange(64),
        answer_B=texts_M[positive_B],
        same_query_B=1000 + torch.arange(64),
        candidate_M=texts_M,
        owner_M=owner_M,
        positive_index_B=positive_B,
        in_row_only=False,
        start_B=zero_B,
        end_B=zero_B,
    )
    tile = 20 * M * 8
    with Largest() as largest:
        by_tiles(q_BD, d_MD, mask, rows=20)
    assert largest.bytes <= tile
    with Largest() as largest:  # negative control
        by_reference(q_BD, d_MD, positive_B)
    assert largest.bytes == 64 * M * 8


def test_shapes_that_do_not_match_are_errors():
    q_BD, d_MD, positive_B = problem()
    mask = distinct(positive_B)
    with pytest.raises(ValueError, match="differ: 4, 5, 5"):
        query_to_passage_loss(q_BD[:, :4], d_MD, mask, temperature=0.1, weight=1.0)
    with pytest.raises(ValueError, match="6 anchors, 6 answers, 7 anchor hashes"):
        query_to_passage_loss(q_BD[:6], d_MD, mask, temperature=0.1, weight=1.0)
    with pytest.raises(ValueError, match="7 anchors, 6 answers"):
        contrastive_local_loss(q_BD, d_MD, q_BD[:6], mask, temperature=0.1, weight=1.0)
    with pytest.raises(ValueError, match="18 candidates, 19 hashes"):
        query_to_passage_loss(q_BD, d_MD[:18], mask, temperature=0.1, weight=1.0)
