"""Texts of a global batch, cut by tokens and dealt to ranks."""

from __future__ import annotations

import numpy as np
import pytest

from lodestar.config.schema import BatchPlan
from lodestar.data.micro_batches import deal, padded_width

LENGTHS = np.random.default_rng(0).lognormal(4.6, 0.8, 720).clip(4, 512).astype(int)
"""Tokens of texts, as of web pages: half have fewer than 100."""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 8, 48])
def test_each_text_is_dealt_once_and_no_micro_batch_holds_more_than_the_limit(ranks: int, packed: bool) -> None:
    dealt = deal(LENGTHS, BatchPlan(len(LENGTHS), ranks, micro_tokens=2048), packed=packed)
    assert sorted(dealt.order.tolist()) == list(range(len(LENGTHS)))
    assert len({len(micro_batches) for micro_batches in dealt.of_rank}) == 1
    for micro_batches, tokens in zip(dealt.of_rank, dealt.tokens_of_rank, strict=True):
        for indices, cost in zip(micro_batches, tokens, strict=True):
            lengths = LENGTHS[indices]
            assert cost == (lengths.sum() if packed else len(lengths) * padded_width(max(lengths, default=0)))
            assert cost <= 2048
    assert sorted(number for numbers in dealt.numbers for number in numbers) == list(
        range(ranks * len(dealt.numbers[0]))
    )


def test_ranks_have_as_much_to_do_and_little_of_it_is_padding() -> None:
    """In one micro-batch of each rank's own part, on 48 ranks, padding is 65 % and imbalance 37 %."""
    for ranks, most_padding, most_imbalance in ((2, 0.09, 0.01), (8, 0.08, 0.02), (48, 0.06, 0.07)):
        dealt = deal(LENGTHS, BatchPlan(len(LENGTHS), ranks, micro_tokens=4096))
        tokens = [sum(of_rank) for of_rank in dealt.tokens_of_rank]
        assert 1 - LENGTHS.sum() / sum(tokens) < most_padding
        assert max(tokens) / (sum(tokens) / ranks) - 1 < most_imbalance


def test_a_text_longer_than_the_limit_is_a_micro_batch() -> None:
    dealt = deal([40, 5, 5], BatchPlan(3, 1, micro_tokens=16))
    assert [indices.tolist() for indices in dealt.of_rank[0]] == [[0], [1, 2]] and not dealt.fits_at_once


def test_a_rank_without_texts_has_empty_micro_batches() -> None:
    dealt = deal([8, 8], BatchPlan(2, 3, micro_size=1))
    assert dealt.texts_per_rank == [1, 1, 0] and [len(m) for m in dealt.of_rank[2]] == [0]


def test_what_fits_at_once_is_still_sorted_into_groups() -> None:
    at_once = deal(LENGTHS, BatchPlan(len(LENGTHS), 1, micro_tokens=10**6))
    assert at_once.fits_at_once and len(at_once.of_rank[0]) == 4
    assert at_once.tokens_of_rank[0] == sorted(at_once.tokens_of_rank[0], reverse=True)


def test_by_examples_all_micro_batches_hold_nearly_equally_many() -> None:
    dealt = deal(LENGTHS, BatchPlan(len(LENGTHS), 7, micro_size=10))
    sizes = [len(indices) for micro_batches in dealt.of_rank for indices in micro_batches]
    assert max(sizes) <= 10 and max(sizes) - min(sizes) <= 1
