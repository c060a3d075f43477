"""Which tokens the encoder must predict, and which the decoder's rows attend to. Tensor arithmetic only.

A word is a run of tokens with the same word index; special tokens and pads have -1 and are never masked, but [UNK] is a
word or a part of one (retromae/tokenization.py). Every draw is hashed from a key of the text, so that a text gets the
same masks in any batch, with any padding, on any device.

Shape suffixes: B texts, L tokens (padded), S masks drawn per text, W words (padded), N = B * S rows, V ordinary ids,
P pairs of masks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lodestar.devices import can_read
from lodestar.rng import below, hashed, uniform

IGNORED = -100
"""The label of a token that is not to be predicted; torch's cross-entropy ignores it by default."""

_WORD_BITS = 13  # of a sort key: the word index; the 18 bits above it are random
_TOO_LONG = 2**30  # tokens: more than any num_to_mask
_ENCODER, _REPLACEMENT_DRAW, _REPLACEMENT, _DECODER, _ROW = range(5)  # counters for a text's key, one for each purpose


def num_to_mask(lengths_B: Tensor, ratio: float) -> Tensor:
    """(B,) int64: how many tokens to mask, max(1, round(ratio * length)); [CLS] and [SEP] count as tokens.

    lengths_B   int64, real tokens of each text
    """
    return (lengths_B.double() * ratio).round().long().clamp(min=1)


def whole_word_masking(words_BL: Tensor, num_to_mask_B: Tensor, rng_key_B: Tensor, sets: int) -> Tensor:
    """(B, S, L) bool: `sets` draws per text of whole words that have together at most `num_to_mask_B` tokens.

    Words are taken in a random order; a word that would exceed `num_to_mask_B` is skipped.

    words_BL        int16..int64, index of each token's word, -1 for special tokens and pads
    num_to_mask_B   int64, tokens to mask
    rng_key_B       int64, `rng.key` of each text
    raises          ValueError for texts of more than 8,192 tokens
    """
    if words_BL.shape[1] > 2**_WORD_BITS:
        raise ValueError(f"texts of {words_BL.shape[1]} tokens; masks are made for at most {2**_WORD_BITS}")
    word_BL, size_BW = _words(words_BL)
    order_BSW = _shuffled(rng_key_B, sets, size_BW.shape[1])
    size_BSW = size_BW.gather(1, order_BSW.flatten(1)).view_as(order_BSW)
    masked_BSW = _fill(size_BSW.flatten(0, 1), num_to_mask_B.repeat_interleave(sets)).view_as(order_BSW)
    by_word_BSW = torch.empty_like(masked_BSW).scatter_(2, order_BSW, masked_BSW)
    masked_BSL = by_word_BSW.gather(2, word_BL[:, None].expand(-1, sets, -1))
    return masked_BSL.logical_and_((words_BL >= 0)[:, None])


def mask_tokens(
    ids_BL: Tensor,
    words_BL: Tensor,
    lengths_B: Tensor,
    rng_key_B: Tensor,
    ratio: float,
    mask_id: int,
    ordinary_ids_V: Tensor,
) -> tuple[Tensor, Tensor]:
    """The encoder's input and labels, both (B, L): of the targets 80 % become [MASK], 10 % random tokens, 10 % stay.

    ordinary_ids_V   the ids that are no special tokens; random tokens are among them. The published code draws from the
                     whole vocabulary: of BERT's 30,522 ids, 5 are special tokens.
    returns          ids, and labels: the clean id of each target, -100 elsewhere
    """
    is_target_BL = whole_word_masking(words_BL, num_to_mask(lengths_B, ratio), hashed(rng_key_B, _ENCODER), sets=1)[
        :, 0
    ]
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    replacement_draw_BL = uniform(hashed(rng_key_B, _REPLACEMENT_DRAW)[:, None], position_L)
    random_BL = ordinary_ids_V[below(len(ordinary_ids_V), hashed(rng_key_B, _REPLACEMENT)[:, None], position_L)]
    masked_input_ids_BL = ids_BL.masked_fill(is_target_BL & (replacement_draw_BL < 0.8), mask_id)
    masked_input_ids_BL = torch.where(
        is_target_BL & (replacement_draw_BL >= 0.8) & (replacement_draw_BL < 0.9),
        random_BL.to(ids_BL.dtype),
        masked_input_ids_BL,
    )
    return masked_input_ids_BL, ids_BL.masked_fill(~is_target_BL, IGNORED)


def decoder_visibility(words_BL: Tensor, lengths_B: Tensor, rng_key_B: Tensor, ratio: float, sets: int) -> Tensor:
    """(B, 1, L, L) bool: True where row i of the decoder attends to column j.

    Hidden from each row are its own column and the words of one of min(length, sets) draws, picked with replacement.
    Every row but row 0 attends to column 0 (the text's vector), and none to pads.

    sets   draws per text; 0: each row has a draw of its own
    """
    B, L = words_BL.shape
    position_L = torch.arange(L, device=words_BL.device)
    draws = min(L, sets or L)
    masked_BSL = whole_word_masking(words_BL, num_to_mask(lengths_B, ratio), hashed(rng_key_B, _DECODER), draws)
    if sets:
        set_index_BL = below(lengths_B.clamp(1, sets)[:, None], hashed(rng_key_B, _ROW)[:, None], position_L)
        masked_BSL = masked_BSL[torch.arange(B, device=set_index_BL.device)[:, None], set_index_BL]
    attention_mask_BLL = masked_BSL.logical_not_()
    attention_mask_BLL[:, :, 0].fill_(True)
    attention_mask_BLL.diagonal(dim1=1, dim2=2).fill_(False)
    attention_mask_BLL &= (position_L < lengths_B[:, None])[:, None]
    return attention_mask_BLL[:, None]


def _words(words_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Word index of each token, from 0 in each text (B, L), and the tokens of each word (B, W), _TOO_LONG for none."""
    in_word_BL = words_BL >= 0
    starts_BL = in_word_BL.clone()
    starts_BL[:, 1:] &= words_BL[:, 1:] != words_BL[:, :-1]
    word_BL = (starts_BL.cumsum(1) - 1).clamp_(min=0)
    # There are fewer words than tokens: a cheaper sort.
    width = int(word_BL.max()) + 1 if can_read(word_BL) and word_BL.numel() else words_BL.shape[1]
    size_BW = torch.zeros(len(words_BL), width, dtype=torch.int32, device=words_BL.device)
    size_BW.scatter_add_(1, word_BL, in_word_BL.int())
    return word_BL, size_BW.masked_fill_(size_BW == 0, _TOO_LONG)


def _shuffled(rng_key_B: Tensor, sets: int, words: int) -> Tensor:
    """(B, S, W) int64: the word indices in a random order for each set."""
    pair_P = torch.arange((sets + 1) // 2, device=rng_key_B.device)
    word_W = torch.arange(words, device=rng_key_B.device)
    bits_BPW = hashed(rng_key_B[:, None, None], pair_P[:, None], word_W)
    # 63 random bits serve two sets. The word index in the low bits makes sorting the keys sort the words, ties too.
    random_BSW = torch.stack(((bits_BPW & 0x7FFF_FFFF).int(), (bits_BPW >> 32).int()), 2).flatten(1, 2)[:, :sets]
    keys_BSW = (random_BSW >> _WORD_BITS << _WORD_BITS) | word_W.int()
    # numpy sorts with vector instructions: 50 times as fast as torch on a CPU.
    sorted_BSW = torch.as_tensor(np.sort(keys_BSW.numpy())) if can_read(keys_BSW) else keys_BSW.sort().values
    return (sorted_BSW & (2**_WORD_BITS - 1)).long()


def _fill(size_NW: Tensor, max_tokens_N: Tensor) -> Tensor:
    """(N, W) bool: in each row the words to mask, taken from left to right if they fit into the tokens that are left.

    size_NW        tokens of each word
    max_tokens_N   to mask in each row
    """
    return (_fill_until_done if can_read(size_NW) else _fill_by_halves)(size_NW, max_tokens_N.int())


def _fill_until_done(size_NW: Tensor, free_N: Tensor) -> Tensor:
    """`_fill` in as many rounds as the rows need, each on the rows that are not finished.

    A cumulative sum takes all words up to the first that does not fit. From then on that word never fits, so the next
    round starts after it: there are at most as many rounds as the longest word has tokens.
    """
    masked_NW = torch.zeros_like(size_NW, dtype=torch.bool)
    row_N = torch.arange(len(size_NW), device=size_NW.device)
    while len(row_N):
        fits_NW = size_NW <= free_N[:, None]
        used_NW = (size_NW * fits_NW).cumsum(1, dtype=torch.int32)
        next_NW = fits_NW & (used_NW <= free_N[:, None])
        masked_NW[row_N] |= next_NW
        free_N = free_N - (size_NW * next_NW).sum(1, dtype=torch.int32)
        size_NW = size_NW.masked_fill(next_NW, _TOO_LONG)
        is_unfinished_N = (size_NW <= free_N[:, None]).any(1)
        row_N, size_NW, free_N = row_N[is_unfinished_N], size_NW[is_unfinished_N], free_N[is_unfinished_N]
    return masked_NW


def _fill_by_halves(size_NW: Tensor, free_N: Tensor) -> Tensor:
    """`_fill` in a number of rounds that W alone determines, at least the tokens of each row: the host does not wait.

    A round begins with fewer than 2 * half tokens free and ends with fewer than half, or with no word left. Words of
    fewer than half tokens fit until then. Of the others at most one is taken, because it leaves fewer than half free:
    it ends the round, or the small word does after which fewer than half are free.
    """
    W = size_NW.shape[1]
    free_N = free_N.clamp(max=W)
    none = free_N.new_full((), W)
    position_W = torch.arange(W, dtype=torch.int32, device=size_NW.device)
    start_N = torch.zeros_like(free_N)
    masked_NW = torch.zeros_like(size_NW, dtype=torch.bool)
    for half in [2**bits for bits in reversed(range(W.bit_length()))]:
        is_left_NW = position_W >= start_N[:, None]
        is_small_NW = (size_NW < half) & is_left_NW
        free_NW = free_N[:, None] - (size_NW * is_small_NW).cumsum(1, dtype=torch.int32)
        ends_NW = torch.where(is_small_NW, free_NW < half, is_left_NW & (size_NW <= free_NW))
        end_N = torch.where(ends_NW, position_W, none).amin(1)
        # Rows that have fewer than half tokens free wait for a later round.
        end_N = torch.where(free_N < half, start_N - 1, end_N)
        taken_NW = (is_small_NW & (position_W <= end_N[:, None])) | (ends_NW & (position_W == end_N[:, None]))
        masked_NW |= taken_NW
        free_N = free_N - (size_NW * taken_NW).sum(1, dtype=torch.int32)
        start_N = end_N + 1
    return masked_NW
