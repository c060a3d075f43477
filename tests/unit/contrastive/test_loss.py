"""Shape suffixes: B queries, M passages, D width, G passages of a query's own row."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.loss import LocalLoss, contrastive_local_loss, distillation_local_loss, info_nce, matryoshka
from contrastive.negatives import NegativeMask

B, M, D = 7, 19, 5
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
"""fp64 against fp64 in another order of summation."""


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def distinct(positive_B: Tensor, passages: int = M) -> NegativeMask:
    """No two texts are equal; query i, hash 1000 + i, is answered by its positive, hash 1 + its place."""
    query_B = 1000 + torch.arange(len(positive_B))
    nowhere_B = torch.zeros(len(positive_B), dtype=torch.int64)
    return NegativeMask(
        anchor_B=query_B,
        answer_B=1 + positive_B,
        same_query_B=query_B,
        candidate_M=1 + torch.arange(passages),
        owner_M=torch.full((passages,), -1).index_copy(0, positive_B, query_B),
        positive_index_B=positive_B,
        in_row_only_B=nowhere_B.bool(),
        start_B=nowhere_B,
        end_B=nowhere_B,
    )


def with_equal_texts(positive_B: Tensor, rules: str = "psq") -> NegativeMask:
    """The rules that hide something: (p)ositive's text again, the query it(s)elf, a positive of an equal (q)uery."""
    identity = distinct(positive_B)
    passage_M, query_B, owner_M = identity.candidate_M.clone(), identity.anchor_B.clone(), identity.owner_M.clone()
    if "p" in rules:
        passage_M[positive_B[1] + 1] = passage_M[positive_B[1]]
        passage_M[positive_B[4]] = passage_M[positive_B[1]]
    if "s" in rules:
        passage_M[positive_B[2] + 1] = query_B[2]
    if "q" in rules:
        query_B[5] = query_B[3]
        owner_M[positive_B[5]] = query_B[3]
    return replace(
        identity,
        anchor_B=query_B,
        same_query_B=query_B,
        answer_B=passage_M[positive_B],
        candidate_M=passage_M,
        owner_M=owner_M,
    )


def hidden_by_loops(identity: NegativeMask) -> Tensor:
    """The rule, word for word."""
    not_negative_BM = torch.zeros(len(identity.positive_index_B), len(identity.candidate_M), dtype=torch.bool)
    for i, own in enumerate(identity.positive_index_B.tolist()):
        for m in range(len(identity.candidate_M)):
            if m == own:
                continue
            equal = identity.candidate_M[m] in (identity.answer_B[i], identity.anchor_B[i])
            of_its_kin = identity.owner_M[m] == identity.same_query_B[i]
            outside = identity.in_row_only_B[i] and not identity.start_B[i] <= m < identity.end_B[i]
            not_negative_BM[i, m] = bool(equal or of_its_kin or outside)
    return not_negative_BM


def share_of(q_BD: Tensor, d_MD: Tensor, identity: NegativeMask, **more: Any) -> LocalLoss:
    """From queries to passages: each is answered by its own candidate."""
    return contrastive_local_loss(q_BD, d_MD, d_MD[identity.positive_index_B], identity, **more)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return unit(B, D, seed=seed), unit(M, D, seed=seed + 1), torch.arange(B) * 2


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def by_reference(
    q_BD: Tensor, d_MD: Tensor, positive_B: Tensor, not_negative_BM: Tensor | None = None, temperature: float = 0.1
) -> list[Tensor]:
    """Mean loss and its gradients, with all scores held."""
    q_BD, d_MD = q_BD.clone().requires_grad_(), d_MD.clone().requires_grad_()
    nats_B = info_nce(q_BD, d_MD, positive_B, temperature=temperature, not_negative_BM=not_negative_BM)
    return gradients(nats_B.mean(), q_BD, d_MD)


def by_tiles(
    q_BD: Tensor, d_MD: Tensor, identity: NegativeMask, rows: int = 3, temperature: float = 0.1
) -> list[Tensor]:
    """The same in tiles of at most so many rows."""
    q_BD, d_MD = q_BD.clone().requires_grad_(), d_MD.clone().requires_grad_()
    tile_bytes = rows * len(d_MD) * q_BD.element_size()
    share = share_of(q_BD, d_MD, identity, temperature=temperature, weight=1 / len(q_BD), tile_bytes=tile_bytes)
    return gradients(share.value, q_BD, d_MD)


# --- the plain loss --------------------------------------------------------------------------


def test_two_queries_and_two_passages_by_hand():
    q_BD = torch.eye(2)
    d_MD = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # scores / 0.5: [2.0, 1.2] and [0.0, 1.6]
    by_hand = [math.log(1 + math.exp(1.2 - 2.0)), math.log(1 + math.exp(0.0 - 1.6))]
    nats_B = info_nce(q_BD, d_MD, torch.tensor([0, 1]), temperature=0.5)
    torch.testing.assert_close(nats_B, torch.tensor(by_hand))
    share = share_of(q_BD, d_MD, distinct(torch.arange(2), 2), temperature=0.5, weight=0.5)
    torch.testing.assert_close(share.value, torch.tensor(by_hand).mean())
    assert (share.masked, share.negatives, share.correct) == (0, 2, 2)


def test_equal_scores_give_the_logarithm_of_the_number_of_passages():
    q_BD, d_MD, positive_B = unit(1, D, seed=0).expand(B, D), unit(1, D, seed=0).expand(M, D), torch.arange(B)
    nats_B = info_nce(q_BD, d_MD, positive_B, temperature=0.01)
    torch.testing.assert_close(nats_B, torch.full_like(nats_B, math.log(M)))
    share = share_of(q_BD, d_MD, distinct(positive_B), temperature=0.01, weight=1 / B)
    torch.testing.assert_close(share.value, nats_B.mean())


@pytest.mark.parametrize("tiled", [False, True])
def test_the_order_of_passages_does_not_matter(tiled: bool):
    q_BD, d_MD, positive_B = problem()
    order_M = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    place_M = order_M.argsort()
    identity = with_equal_texts(positive_B)
    candidate_M, owner_M = identity.candidate_M[order_M], identity.owner_M[order_M]
    moved = replace(identity, candidate_M=candidate_M, owner_M=owner_M, positive_index_B=place_M[positive_B])
    if tiled:
        there, here = (
            by_tiles(q_BD, d_MD[order_M], moved),
            by_tiles(q_BD, d_MD, identity),
        )
    else:
        there, here = by_reference(q_BD, d_MD[order_M], place_M[positive_B]), by_reference(q_BD, d_MD, positive_B)
    there[2] = there[2][place_M]
    torch.testing.assert_close(there, here, **TIGHT)


# --- tiles against the plain loss ------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])  # of 7: alone, an uneven last tile, all at once
@pytest.mark.parametrize("rules", ["", "psq"])
def test_tiles_give_the_plain_loss_and_its_gradients(rows: int, rules: str):
    q_BD, d_MD, positive_B = problem()
    identity = with_equal_texts(positive_B, rules)
    reference = by_reference(q_BD, d_MD, positive_B, identity.not_negative())
    torch.testing.assert_close(by_tiles(q_BD, d_MD, identity, rows), reference, **TIGHT)


@pytest.mark.parametrize("rules", ["", "psq"])
def test_gradients_agree_with_finite_differences(rules: str):
    q_BD, d_MD, positive_B = problem()
    identity = with_equal_texts(positive_B, rules)
    weight_B = torch.linspace(0.1, 1.0, B, dtype=torch.float64)

    def plain(q_BD: Tensor, d_MD: Tensor) -> Tensor:
        not_negative_BM = identity.not_negative()
        return (weight_B * info_nce(q_BD, d_MD, positive_B, temperature=0.3, not_negative_BM=not_negative_BM)).sum()

    def tiled(q_BD: Tensor, d_MD: Tensor) -> Tensor:
        # the factor 2 is an upstream gradient that is not 1
        return 2 * share_of(q_BD, d_MD, identity, temperature=0.3, weight=weight_B, tile_bytes=400).value

    inputs = (q_BD.requires_grad_(), d_MD.requires_grad_())
    torch.testing.assert_close(tiled(*inputs), 2 * plain(*inputs), **TIGHT)
    assert torch.autograd.gradcheck(plain, inputs)
    assert torch.autograd.gradcheck(tiled, inputs)


def test_queries_may_be_split_over_ranks_and_their_shares_added():
    q_BD, d_MD, positive_B = problem()
    identity = with_equal_texts(positive_B)
    value, dq_BD, dd_MD = by_tiles(q_BD, d_MD, identity)
    parts = []
    for part in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)):  # the second has no query
        mine = replace(identity, **{n: getattr(identity, n)[part] for n in vars(identity) if n.endswith("_B")})
        q_part, d_part = q_BD[part].clone().requires_grad_(), d_MD.clone().requires_grad_()
        share = share_of(q_part, d_part, mine, temperature=0.1, weight=1 / B, tile_bytes=400)
        parts.append(gradients(share.value, q_part, d_part))
    values, dqs, dds = zip(*parts, strict=True)
    torch.testing.assert_close([sum(values), torch.cat(dqs), sum(dds)], [value, dq_BD, dd_MD], **TIGHT)


def test_a_rank_without_queries_adds_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    q_BD, d_MD = torch.zeros(0, D, requires_grad=True), unit(M, D, seed=1, dtype=torch.float32).requires_grad_()
    share = share_of(q_BD, d_MD, distinct(empty), temperature=0.01, weight=1 / B)
    value, dq_BD, dd_MD = gradients(share.value, q_BD, d_MD)
    assert value == 0 and dq_BD.shape == (0, D) and not dd_MD.any()
    assert share.masked == share.negatives == share.correct == 0


def test_nobody_has_any_row():
    q_BD, empty = torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    share = share_of(q_BD, q_BD[:0], distinct(empty, 0), temperature=0.01, weight=1.0)
    assert share.value == 0 and share.negatives == 0


def test_a_query_with_its_positive_alone_is_right_at_no_cost():
    q_BD, d_MD = unit(1, D, seed=0, dtype=torch.float32), unit(1, D, seed=1, dtype=torch.float32)
    value, dq_BD, dd_MD = by_tiles(q_BD, d_MD, distinct(torch.tensor([0]), 1), temperature=0.01)
    assert value == 0 and not dq_BD.any() and not dd_MD.any()


def test_only_the_wanted_gradients_are_taken():
    q_BD, d_MD, positive_B = problem()
    identity = distinct(positive_B)
    both = by_tiles(q_BD, d_MD, identity)
    for wanted, expected in ((q_BD.clone().requires_grad_(), both[1]), (d_MD.clone().requires_grad_(), both[2])):
        pair = (wanted, d_MD) if len(wanted) == B else (q_BD, wanted)
        share = share_of(*pair, identity, temperature=0.1, weight=1 / B)
        torch.testing.assert_close(torch.autograd.grad(share.value, wanted)[0], expected, **TIGHT)
    with torch.no_grad():
        share = share_of(q_BD.requires_grad_(), d_MD, identity, temperature=0.1, weight=1 / B)
    assert not share.value.requires_grad
    torch.testing.assert_close(share.value, both[0], **TIGHT)


# --- answers that are no candidates, and a temperature that is learned -------------------------


def test_answers_need_not_be_candidates():
    """Queries against queries: each one's own place is no negative, its answer comes from elsewhere."""
    q_BD, answer_BD, positive_index_B = unit(B, D, seed=0), unit(B, D, seed=1), torch.arange(B)
    identity = replace(distinct(positive_index_B, B), owner_M=torch.full((B,), -1))
    inputs = [q_BD.clone().requires_grad_(), answer_BD.clone().requires_grad_()]
    share = contrastive_local_loss(
        inputs[0], inputs[0], inputs[1], identity, temperature=0.1, weight=1.0, tile_bytes=200
    )
    found = gradients(share.value, *inputs)
    nats = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        answer = inputs[0][i] @ inputs[1][i] / 0.1
        others = [inputs[0][i] @ inputs[0][j] / 0.1 for j in range(B) if j != i]
        nats = nats + torch.stack([answer, *others]).logsumexp(0) - answer
    torch.testing.assert_close(found, gradients(nats, *inputs), **TIGHT)
    assert share.negatives == B * (B - 1)


@pytest.mark.parametrize("rules", ["", "psq"])
def test_the_gradient_of_the_temperature_agrees_with_finite_differences(rules: str):
    q_BD, d_MD, positive_B = problem()
    identity = with_equal_texts(positive_B, rules)

    def tiled(temperature: Tensor) -> Tensor:
        return share_of(q_BD, d_MD, identity, temperature=temperature, weight=1 / B, tile_bytes=400).value

    assert torch.autograd.gradcheck(tiled, torch.tensor(0.3, dtype=torch.float64, requires_grad=True))


# --- equal texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["p", "s", "q", "psq"])
def test_equal_texts_are_no_negatives(rules: str):
    q_BD, d_MD, positive_B = problem()
    identity = with_equal_texts(positive_B, rules)
    not_negative_BM = hidden_by_loops(identity)
    assert not_negative_BM.any() and torch.equal(identity.not_negative(), not_negative_BM)
    assert torch.equal(identity.has_duplicates(), not_negative_BM.any(1))
    found = by_tiles(q_BD, d_MD, identity)
    torch.testing.assert_close(found, by_reference(q_BD, d_MD, positive_B, not_negative_BM), **TIGHT)
    # negative control: without the rule all three differ by far more than rounding
    for with_rule, without in zip(found, by_tiles(q_BD, d_MD, distinct(positive_B)), strict=True):
        assert (with_rule - without).abs().max() > 1e-6


def test_random_collisions_are_hidden_as_the_loops_say():
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        positive_B = torch.randperm(M, generator=draw)[:B]
        start_B = (positive_B - 1).clamp(min=0)
        identity = NegativeMask(
            anchor_B=torch.randint(0, 30, (B,), generator=draw),
            answer_B=torch.randint(0, 30, (B,), generator=draw),
            same_query_B=torch.randint(0, 30, (B,), generator=draw),
            candidate_M=torch.randint(0, 30, (M,), generator=draw),
            owner_M=torch.randint(-1, 30, (M,), generator=draw),
            positive_index_B=positive_B,
            in_row_only_B=torch.rand(B, generator=draw) < 0.3,
            start_B=start_B,
            end_B=start_B + 4,
        )
        not_negative_BM = hidden_by_loops(identity)
        assert torch.equal(identity.not_negative(), not_negative_BM)
        q_BD, d_MD, _ = problem(seed)
        reference = by_reference(q_BD, d_MD, positive_B, not_negative_BM)
        torch.testing.assert_close(by_tiles(q_BD, d_MD, identity), reference, **TIGHT)


def test_queries_that_are_alone_see_only_their_own_passages():
    q_BD, d_MD, positive_B = problem()
    in_row_only_B = torch.tensor([True, False, True, True, False, True, True])
    identity = replace(distinct(positive_B), in_row_only_B=in_row_only_B, start_B=positive_B, end_B=positive_B + 2)
    not_negative_BM = hidden_by_loops(identity)
    assert not_negative_BM.sum(1).tolist() == [M - 2 if alone else 0 for alone in in_row_only_B]
    found = by_tiles(q_BD, d_MD, identity)
    torch.testing.assert_close(found, by_reference(q_BD, d_MD, positive_B, not_negative_BM), **TIGHT)
    assert not torch.allclose(found[1], by_tiles(q_BD, d_MD, distinct(positive_B))[1])


def test_pairs_are_counted():
    q_BD, d_MD, positive_B = problem()
    in_row_only_B = torch.arange(B) == 1
    identity = with_equal_texts(positive_B)
    identity = replace(identity, in_row_only_B=in_row_only_B, start_B=positive_B, end_B=positive_B + 2)
    not_negative_BM = hidden_by_loops(identity)
    scores_BM = (q_BD @ d_MD.T).masked_fill(not_negative_BM, -torch.inf)
    share = share_of(q_BD, d_MD, identity, temperature=0.1, weight=1 / B, tile_bytes=400)
    # by hand: 1 sees its text again beside it (the other place lies outside), 4 sees it at two places;
    # 2 sees itself, 3 and 5 see each other's positives
    assert share.masked == 1 + 2 + 1 + 2
    assert share.negatives == B * (M - 1) - (not_negative_BM.sum())
    assert share.correct == (scores_BM.argmax(1) == positive_B).sum()
    assert not any(count.requires_grad for count in share[1:])


def test_a_collapsed_model_is_never_right():
    share = share_of(torch.ones(B, D), torch.ones(M, D), distinct(torch.arange(B)), temperature=0.01, weight=1.0)
    assert share.correct == 0


# --- numbers ---------------------------------------------------------------------------------


def test_cosines_near_one_do_not_overflow_at_a_low_temperature():
    towards_D = unit(1, D, seed=0)
    q_BD = F.normalize(towards_D + 0.01 * unit(B, D, seed=1), dim=1)
    d_MD = F.normalize(towards_D + 0.01 * unit(M, D, seed=2), dim=1)
    positive_B = torch.arange(B)
    assert (q_BD @ d_MD.T).min() > 0.99  # exp(99) is more than fp32 holds
    reference = by_reference(q_BD, d_MD, positive_B, temperature=0.01)
    found = by_tiles(q_BD.float(), d_MD.float(), distinct(positive_B), temperature=0.01)
    assert all(x.isfinite().all() for x in found)
    # a cosine of 1 carries 6e-8 in fp32, divided by 0.01 that is 6e-6 of each probability
    torch.testing.assert_close([x.double() for x in found], reference, rtol=2e-4, atol=2e-5)


def test_a_query_that_is_nearly_right_keeps_an_exact_gradient():
    """p(positive) rounds to 1 in fp32: the plain softmax leaves no gradient, these tiles do."""
    q_BD, positive_B = torch.eye(2, 3), torch.arange(2)
    d_MD = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5]]), dim=1)
    reference = by_reference(q_BD.double(), d_MD.double(), positive_B, temperature=0.02)
    found = by_tiles(q_BD, d_MD, distinct(positive_B, 3), temperature=0.02)
    plain = by_reference(q_BD, d_MD, positive_B, temperature=0.02)
    assert 0 < reference[0] < 1e-8 and plain[0] == 0
    # relative, for the numbers themselves are tiny; the scores carry 6e-8 / 0.02
    torch.testing.assert_close([x.double() for x in found], reference, rtol=1e-4, atol=1e-18)
    assert plain[2][0, 0] == 0 > reference[2][0, 0]


def test_bf16_embeddings_are_multiplied_in_fp32_whatever_autocast_says():
    q_BD, d_MD, positive_B = problem()
    q_BD, d_MD, identity = q_BD.bfloat16(), d_MD.bfloat16(), with_equal_texts(positive_B)
    not_negative_BM = identity.not_negative()
    reference = by_reference(q_BD.double(), d_MD.double(), positive_B, not_negative_BM, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_tiles(q_BD, d_MD, identity, temperature=0.01)
        plain = by_reference(q_BD, d_MD, positive_B, not_negative_BM, temperature=0.01)
    for value in (found[0], plain[0]):
        # fp32 scores carry 6e-8 / 0.01; a bf16 product would miss the loss by 1e-2 and more
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference[0], rtol=2e-5, atol=0.0)
    # gradients come back in the inputs' dtype, rounded to its 8 bits; below 1e-4 also the scores' rounding counts
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    torch.testing.assert_close([x.double() for x in found[1:]], reference[1:], rtol=2**-8, atol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation made."""

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
    nowhere_B = torch.zeros(64, dtype=torch.int64)
    texts_M = torch.arange(M) // 2 if rules else torch.arange(M)
    identity = NegativeMask(
        anchor_B=1000 + torch.arange(64),
        answer_B=texts_M[positive_B],
        same_query_B=1000 + torch.arange(64),
        candidate_M=texts_M,
        owner_M=owner_M,
        positive_index_B=positive_B,
        in_row_only_B=nowhere_B.bool(),
        start_B=nowhere_B,
        end_B=nowhere_B,
    )
    tile = 20 * M * 8
    with Largest() as seen:
        by_tiles(q_BD, d_MD, identity, rows=20)
    assert seen.bytes <= tile
    with Largest() as seen:  # negative control
        by_reference(q_BD, d_MD, positive_B)
    assert seen.bytes == 64 * M * 8


def test_what_does_not_fit_together_is_named():
    q_BD, d_MD, positive_B = problem()
    identity = distinct(positive_B)
    with pytest.raises(ValueError, match="differ: 4, 5, 5"):
        share_of(q_BD[:, :4], d_MD, identity, temperature=0.1, weight=1.0)
    with pytest.raises(ValueError, match="6 anchors, 7 answers"):
        share_of(q_BD[:6], d_MD, identity, temperature=0.1, weight=1.0)
    with pytest.raises(ValueError, match="18 candidates, 19 hashes"):
        share_of(q_BD, d_MD[:18], identity, temperature=0.1, weight=1.0)


# --- distillation ----------------------------------------------------------------------------

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

    def share(q_BD: Tensor, group_BGD: Tensor) -> Tensor:
        return distillation_local_loss(q_BD, group_BGD, TEACHER_BG, temperature=0.2, weight=0.25, valid_BG=VALID_BG)

    reference = gradients(0.25 * kl_by_loops(q_BD, group_BGD, 0.2), q_BD, group_BGD)
    found = gradients(share(q_BD, group_BGD), q_BD, group_BGD)
    torch.testing.assert_close(found, reference, **TIGHT)
    assert not found[1][1].any() and not found[2][1].any()  # the row without a teacher
    assert torch.autograd.gradcheck(share, (q_BD, group_BGD))


def test_distillation_is_nothing_where_the_student_agrees_or_no_teacher_is():
    q_BD, group_BGD = unit(4, D, seed=0), unit(4, 3, D, seed=1)
    scores_BG = torch.einsum("bd,bgd->bg", q_BD, group_BGD) / 0.2
    assert distillation_local_loss(q_BD, group_BGD, scores_BG, temperature=0.2, weight=1.0).abs() < 1e-14
    none_BG = torch.full((4, 3), NAN)
    assert distillation_local_loss(q_BD, group_BGD, none_BG, temperature=0.2, weight=1.0) == 0
    assert distillation_local_loss(q_BD[:0], group_BGD[:0], none_BG[:0], temperature=0.2, weight=1.0) == 0


def test_distillation_weights_rows_and_stays_in_fp32_under_autocast():
    q_BD, group_BGD = unit(4, D, seed=0), unit(4, 3, D, seed=1)
    weight_B = torch.tensor([1.0, 2.0, 0.0, 0.0])
    alone = distillation_local_loss(q_BD[:1], group_BGD[:1], TEACHER_BG[:1], temperature=0.01, weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_local_loss(q_BD.float(), group_BGD.float(), TEACHER_BG, temperature=0.01, weight=weight_B)
    # fp32 scores carry 6e-8 / 0.01
    torch.testing.assert_close(found.double(), alone, rtol=2e-5, atol=0.0)


# --- matryoshka ------------------------------------------------------------------------------


def test_matryoshka_keeps_the_first_numbers_as_a_unit_row():
    x_ND = unit(4, D, seed=0).requires_grad_()
    short_Nd = matryoshka(x_ND, 3)
    torch.testing.assert_close(short_Nd, x_ND[:, :3] / x_ND[:, :3].norm(dim=1, keepdim=True), **TIGHT)
    torch.testing.assert_close(short_Nd.norm(dim=1), torch.ones(4, dtype=torch.float64), **TIGHT)
    assert torch.autograd.gradcheck(lambda x_ND: matryoshka(x_ND, 3), x_ND)
    assert matryoshka(x_ND, D) is x_ND


@pytest.mark.parametrize("width", [0, D + 1])
def test_a_width_that_is_not_there_is_named(width: int):
    with pytest.raises(ValueError, match=f"width {width} is not one of 1 to {D}"):
        matryoshka(unit(4, D, seed=0), width)
