"""Masks against a walk written with loops, and the rules that hold for every text."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lodestar.rng import hashed, key
from retromae import masks
from retromae.masks import _DECODER, _ROW, IGNORED, decoder_visibility, mask_tokens, num_to_mask, whole_word_masking

MASK_ID, FIRST_ORDINARY, VOCABULARY = 4, 5, 1000
ORDINARY = torch.arange(FIRST_ORDINARY, VOCABULARY)


def a_text(rng: random.Random, length: int, longest_word: int) -> list[int]:
    """Word numbers of one text of `length` tokens: a special token, words of 1 to `longest_word` tokens, another."""
    words = [-1]
    while len(words) < length - 1:
        number = words[-1] + 1
        words += [number] * min(rng.randint(1, longest_word), length - 1 - len(words))
    return [*words, -1]


def a_batch(seed: int, texts: int, longest: int, longest_word: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """words_BL, lengths_B, rng_key_B of texts of 3 to `longest` tokens."""
    rng = random.Random(seed)
    rows = [a_text(rng, rng.randint(3, longest), longest_word) for _ in range(texts)]
    width = max(map(len, rows))
    words = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int16)
    return words, torch.tensor(list(map(len, rows))), torch.tensor([key(seed, "mask", i) for i in range(texts)])


def random_order(key_1: Tensor, draw: int, words: int) -> list[int]:
    """The order of a draw: by 18 of its 31 bits of the hash, ties by index."""

    def place(word: int) -> tuple[int, int]:
        bits = int(hashed(key_1, draw // 2, word))
        half = bits >> 32 if draw % 2 else bits & 0x7FFF_FFFF
        return half >> 13, word

    return sorted(range(words), key=place)


def walk(words_L: list[int], room: int, order: list[int], *, stop_at_the_first_overshoot: bool = False) -> list[bool]:
    """Words in this order until `room` tokens are masked; a word that would exceed them is skipped."""
    masked_words: set[int] = set()
    for word in order:
        if room == 0:
            break
        size = words_L.count(word)
        if size > room:
            if stop_at_the_first_overshoot:
                break
            continue
        masked_words.add(word)
        room -= size
    return [word in masked_words for word in words_L]


@pytest.mark.parametrize("longest_word", [1, 4, 30])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_words_are_masked_as_by_a_walk_in_the_same_order(longest_word: int, ratio: float) -> None:
    words, lengths, keys = a_batch(1, texts=12, longest=70, longest_word=longest_word)
    room = num_to_mask(lengths, ratio)
    is_masked = whole_word_masking(words, room, keys, sets=5)
    expected, stopped_early = [], []
    for row, r, k in zip(words.tolist(), room.tolist(), keys, strict=True):
        orders = [random_order(k, draw, max(row) + 1) for draw in range(5)]
        expected.append([walk(row, r, order) for order in orders])
        stopped_early.append([walk(row, r, order, stop_at_the_first_overshoot=True) for order in orders])
    assert torch.equal(is_masked, torch.tensor(expected))
    assert longest_word == 1 or not torch.equal(is_masked, torch.tensor(stopped_early))


def test_the_number_to_mask_is_rounded_as_python_does_and_at_least_one() -> None:
    lengths = torch.arange(2, 513)
    for ratio in (0.15, 0.3, 0.5):
        assert num_to_mask(lengths, ratio).tolist() == [max(1, round(ratio * n)) for n in lengths.tolist()]


def test_special_tokens_and_pads_are_never_masked_and_words_only_whole() -> None:
    words, lengths, keys = a_batch(2, texts=40, longest=90)
    is_masked = whole_word_masking(words, num_to_mask(lengths, 0.5), keys, sets=8)
    assert not is_masked[(words < 0)[:, None].expand_as(is_masked)].any()
    same_word = (words[:, 1:] == words[:, :-1])[:, None].expand(-1, 8, -1)
    torch.testing.assert_close(is_masked[:, :, 1:][same_word], is_masked[:, :, :-1][same_word])
    assert (is_masked.sum(2) <= num_to_mask(lengths, 0.5)[:, None]).all()


def test_with_short_words_exactly_the_number_to_mask_is_masked() -> None:
    words, lengths, keys = a_batch(3, texts=40, longest=200, longest_word=1)
    is_masked = whole_word_masking(words, num_to_mask(lengths, 0.3), keys, sets=3)
    assert torch.equal(is_masked.sum(2), num_to_mask(lengths, 0.3)[:, None].expand(-1, 3))


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_ratio_holds_over_a_corpus(ratio: float) -> None:
    words, lengths, keys = a_batch(4, texts=300, longest=300)
    is_masked = whole_word_masking(words, num_to_mask(lengths, ratio), keys, sets=4)
    assert int(is_masked.sum()) / (4 * int(lengths.sum())) == pytest.approx(ratio, rel=0.01)


def test_each_word_is_as_likely_and_sets_are_independent() -> None:
    texts, length, sets = 1000, 34, 4
    words = torch.tensor([[-1, *range(length - 2), -1]]).expand(texts, -1)
    keys = torch.tensor([key(5, i) for i in range(texts)])
    is_masked = whole_word_masking(words, torch.full((texts,), 16), keys, sets)[:, :, 1:-1].double()
    # 4,000 draws at 1/2 have a standard deviation of 0.008: five of them.
    assert (is_masked.mean((0, 1)) - 0.5).abs().max() < 0.04
    for other in range(1, sets):
        assert float((is_masked[:, 0] * is_masked[:, other]).mean()) == pytest.approx(0.25, abs=0.01)


def test_a_text_gets_the_same_masks_in_any_batch_and_padding() -> None:
    words, lengths, keys = a_batch(6, texts=9, longest=50)
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, words.shape, generator=torch.Generator().manual_seed(6))
    in_batch = mask_tokens(ids, words, lengths, keys, 0.3, MASK_ID, ORDINARY)
    visibility = {sets: decoder_visibility(words, lengths, keys, 0.5, sets) for sets in (0, 7, 256)}
    for i, n in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        for pads in (0, 13):
            words_1L = torch.nn.functional.pad(words[one, :n], (0, pads), value=-1)
            ids_1L = torch.nn.functional.pad(ids[one, :n], (0, pads))
            single = mask_tokens(ids_1L, words_1L, lengths[one], keys[one], 0.3, MASK_ID, ORDINARY)
            for actual, expected in zip(single, in_batch, strict=True):
                assert torch.equal(actual[0, :n], expected[i, :n])
            for sets, expected in visibility.items():
                actual = decoder_visibility(words_1L, lengths[one], keys[one], 0.5, sets)
                assert torch.equal(actual[0, 0, :n, :n], expected[i, 0, :n, :n])
                assert not actual[..., n:].any()
    other = decoder_visibility(words, lengths, keys + 1, 0.5, 7)
    assert not torch.equal(other, visibility[7])


def test_word_numbers_may_start_anywhere() -> None:
    words, lengths, keys = a_batch(7, texts=5, longest=40)
    shifted = torch.where(words < 0, words, words + 1000)
    room = num_to_mask(lengths, 0.5)
    assert torch.equal(whole_word_masking(shifted, room, keys, 3), whole_word_masking(words, room, keys, 3))


def test_a_text_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="8193 tokens"):
        whole_word_masking(torch.zeros(1, 8193, dtype=torch.int16), torch.tensor([1]), torch.tensor([0]), 1)


def test_of_the_targets_80_percent_are_masked_10_random_and_10_unchanged() -> None:
    words, lengths, keys = a_batch(8, texts=500, longest=300)
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, words.shape, generator=torch.Generator().manual_seed(8))
    masked, labels = mask_tokens(ids, words, lengths, keys, 0.3, MASK_ID, ORDINARY)
    is_target = labels != IGNORED
    assert torch.equal(labels[is_target], ids[is_target])
    assert torch.equal(masked[~is_target], ids[~is_target])
    assert not is_target[words < 0].any()
    assert int(is_target.sum()) / int(lengths.sum()) == pytest.approx(0.3, rel=0.01)
    # Some 22,000 tokens: three standard deviations are below 0.01. One random token in 995 is the clean one.
    now, clean = masked[is_target], ids[is_target]
    assert float((now == MASK_ID).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((now == clean).double().mean()) == pytest.approx(0.1, abs=0.01)
    random_ids = now[(now != MASK_ID) & (now != clean)]
    assert len(random_ids) / len(now) == pytest.approx(0.1, abs=0.01)
    assert int(random_ids.min()) >= FIRST_ORDINARY and len(random_ids.unique()) > 600


@pytest.mark.parametrize("sets", [0, 1, 6, 256])
def test_the_decoder_attends_as_the_rules_say(sets: int) -> None:
    words, lengths, keys = a_batch(9, texts=6, longest=30)
    visible = decoder_visibility(words, lengths, keys, 0.5, sets)
    assert visible.shape == (6, 1, words.shape[1], words.shape[1])
    for text, (row, n) in enumerate(zip(words.tolist(), lengths.tolist(), strict=True)):
        draws = min(n, sets) if sets else n
        room = max(1, round(0.5 * n))
        hidden = []
        for draw in range(draws):
            order = random_order(hashed(keys[text], _DECODER), draw, max(row) + 1)
            hidden.append(walk(row, room, order))
        for i in range(n):
            pick = int(hashed(hashed(keys[text], _ROW), i)) % draws if sets else i
            for j in range(len(row)):
                expected = (j == 0 or not hidden[pick][j]) and j != i and j < n
                assert bool(visible[text, 0, i, j]) == expected, (text, i, j)


def test_rows_of_one_set_have_equal_masks_and_rows_with_their_own_draw_differ() -> None:
    words, lengths, keys = a_batch(10, texts=1, longest=60, longest_word=1)
    words, lengths = torch.tensor([[-1, *range(58), -1]]), torch.tensor([60])

    def patterns(sets: int) -> int:
        visible = decoder_visibility(words, lengths, keys, 0.5, sets)[0, 0]
        visible.diagonal().fill_(True)  # the own column differs by rule; 1 where the draw hides it too
        agree = [(a != b).sum() <= 2 for k, a in enumerate(visible) for b in visible[:k]]
        return sum(map(int, agree))

    assert patterns(1) == 60 * 59 // 2
    assert 0 < patterns(8) < 60 * 59 // 2
    assert patterns(0) == 0


def test_encoder_and_decoder_draw_independently() -> None:
    words, lengths, keys = a_batch(11, texts=20, longest=60)
    labels = mask_tokens(words.long() + 10, words, lengths, keys, 0.5, MASK_ID, ORDINARY)[1]
    hidden = ~decoder_visibility(words, lengths, keys, 0.5, 1)[:, 0, 0]
    hidden[:, 0] = False
    hidden &= words >= 0
    assert not torch.equal(hidden, labels != IGNORED)


@pytest.mark.parametrize("longest_word", [1, 4, 60])
def test_the_masks_of_a_gpu_are_those_of_a_cpu(longest_word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words, lengths, keys = a_batch(12, texts=30, longest=90, longest_word=longest_word)
    on_cpu = [whole_word_masking(words, num_to_mask(lengths, ratio), keys, 5) for ratio in (0.1, 0.3, 0.5, 0.9, 1.2)]
    monkeypatch.setattr(masks, "can_read", lambda x: False)
    on_gpu = [whole_word_masking(words, num_to_mask(lengths, ratio), keys, 5) for ratio in (0.1, 0.3, 0.5, 0.9, 1.2)]
    assert torch.equal(torch.stack(on_gpu), torch.stack(on_cpu))


def test_halves_take_the_words_that_rounds_take_also_when_each_round_takes_one() -> None:
    sizes = [size for longest in range(20, 0, -1) for size in (1, longest)]
    size_NW = torch.full((200, sum(sizes)), 2**30, dtype=torch.int32)
    size_NW[:, : len(sizes)] = torch.tensor(sizes)
    free_N = torch.arange(200, dtype=torch.int32)
    by_rounds = masks._fill_until_done(size_NW, free_N)
    assert torch.equal(masks._fill_by_halves(size_NW, free_N), by_rounds)
    one_round = (size_NW.cumsum(1) <= free_N[:, None]) & (size_NW < 2**30)
    assert not torch.equal(one_round, by_rounds)
