"""Which tokens the encoder must guess, and what each row of the decoder may see. Tensor arithmetic only.

A word is a run of tokens that carry the same word number; special tokens and pads carry -1 and are never chosen. Every
draw is hashed from a key of the text, so that a text gets the same masks in any batch, with any padding, on any device.

Shape suffixes: B texts, L tokens (padded), S sets drawn per text, W words (padded), N = B * S rows, V ordinary ids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lodestar.rng import below, hashed, uniform

IGNORED = -100
"""The label of a token that nobody has to guess; what torch's cross-entropy ignores by default."""

_WORD_BITS = 13  # of a sort key: the word's number; the 18 bits above it are random
_TOO_LONG = 2**30  # tokens; fits no budget
_ENCODER, _REPLACEMENT_DRAW, _REPLACEMENT, _DECODER, _ROW = range(5)
# sub-addresses of a text's key, one for each purpose


def num_to_mask(lengths_B: Tensor, ratio: float) -> Tensor:
    """(B,) int64: how many tokens to choose, max(1, round(ratio * length)); [CLS] and [SEP] count as tokens.

    lengths_B   int64, real tokens of each text
    """
    return (lengths_B.double() * ratio).round().long().clamp(min=1)


def whole_word_masking(words_BL: Tensor, num_to_mask_B: Tensor, rng_key_B: Tensor, sets: int) -> Tensor:
    """(B, S, L) bool: `sets` draws per text of whole words that hold together at most `num_to_mask_B` tokens.

    Words are taken in a random order; one that would overshoot the budget is skipped, and the walk goes on.

    words_BL    int16..int64, number of the word that a token belongs to, -1 for special tokens and pads
    num_to_mask_B    int64, tokens to choose
    rng_key_B      int64, `rng.key` of each text
    raises      ValueError for texts of more than 8,192 tokens
    """
    if words_BL.shape[1] > 2**_WORD_BITS:
        raise ValueError(f"texts of {words_BL.shape[1]} tokens; masks are made for at most {2**_WORD_BITS}")
    word_BL, size_BW = _words(words_BL)
    order_BSW = _shuffled(rng_key_B, sets, size_BW.shape[1])
    size_BSW = size_BW.gather(1, order_BSW.flatten(1)).view_as(order_BSW)
    taken_BSW = _fill(size_BSW.flatten(0, 1), num_to_mask_B.repeat_interleave(sets)).view_as(order_BSW)
    by_word_BSW = torch.empty_like(taken_BSW).scatter_(2, order_BSW, taken_BSW)
    chosen_BSL = by_word_BSW.gather(2, word_BL[:, None].expand(-1, sets, -1))
    return chosen_BSL.logical_and_((words_BL >= 0)[:, None])


def mask_tokens(
    ids_BL: Tensor,
    words_BL: Tensor,
    lengths_B: Tensor,
    rng_key_B: Tensor,
    ratio: float,
    mask_id: int,
    ordinary_ids_V: Tensor,
) -> tuple[Tensor, Tensor]:
    """The encoder's input and labels, both (B, L): of the chosen tokens 80 % are masked, 10 % random, 10 % kept.

    ordinary_ids_V   every id that is no special token; random tokens come from here
    returns          ids, and labels: the clean id where a token was chosen, -100 elsewhere
    """
    chosen_BL = whole_word_masking(words_BL, num_to_mask(lengths_B, ratio), hashed(rng_key_B, _ENCODER), sets=1)[:, 0]
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    replacement_draw_BL = uniform(hashed(rng_key_B, _REPLACEMENT_DRAW)[:, None], position_L)
    random_BL = ordinary_ids_V[below(len(ordinary_ids_V), hashed(rng_key_B, _REPLACEMENT)[:, None], position_L)]
    masked_input_ids_BL = ids_BL.masked_fill(chosen_BL & (replacement_draw_BL < 0.8), mask_id)
    masked_input_ids_BL = torch.where(
        chosen_BL & (replacement_draw_BL >= 0.8) & (replacement_draw_BL < 0.9),
        random_BL.to(ids_BL.dtype),
        masked_input_ids_BL,
    )
    return masked_input_ids_BL, ids_BL.masked_fill(~chosen_BL, IGNORED)


def decoder_visibility(words_BL: Tensor, lengths_B: Tensor, rng_key_B: Tensor, ratio: float, sets: int) -> Tensor:
    """(B, 1, L, L) bool: True where row i of the decoder attends to column j.

    Each row hides the words of one of min(length, sets) draws, picked with replacement, and its own column. Column 0
    (the text's vector) is seen by every row but row 0, pads by none.

    sets   draws per text; 0 lets each row have a draw of its own
    """
    B, L = words_BL.shape
    position_L = torch.arange(L, device=words_BL.device)
    draws = min(L, sets or L)
    hidden_BSL = whole_word_masking(words_BL, num_to_mask(lengths_B, ratio), hashed(rng_key_B, _DECODER), draws)
    if sets:
        pick_BL = below(lengths_B.clamp(1, sets)[:, None], hashed(rng_key_B, _ROW)[:, None], position_L)
        hidden_BSL = hidden_BSL[torch.arange(B, device=pick_BL.device)[:, None], pick_BL]
    visible_BLL = hidden_BSL.logical_not_()
    visible_BLL[:, :, 0] = True
    visible_BLL.diagonal(dim1=1, dim2=2).fill_(False)
    visible_BLL &= (position_L < lengths_B[:, None])[:, None]
    return visible_BLL[:, None]


def _words(words_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Words numbered from 0 in each text (B, L), and their sizes in tokens (B, W); absent words fit no budget."""
    attention_mask_BL = words_BL >= 0
    starts_BL = attention_mask_BL.clone()
    starts_BL[:, 1:] &= words_BL[:, 1:] != words_BL[:, :-1]
    word_BL = (starts_BL.cumsum(1) - 1).clamp_(min=0)
    # Fewer words than tokens make the sort cheaper; elsewhere asking for their number would make the device wait.
    width = int(word_BL.max()) + 1 if word_BL.is_cpu and word_BL.numel() else words_BL.shape[1]
    size_BW = torch.zeros(len(words_BL), width, dtype=torch.int32, device=words_BL.device)
    size_BW.scatter_add_(1, word_BL, attention_mask_BL.int())
    return word_BL, size_BW.masked_fill_(size_BW == 0, _TOO_LONG)


def _shuffled(rng_key_B: Tensor, sets: int, words: int) -> Tensor:
    """(B, S, W) int64: the word numbers in a random order for each set."""
    pair_P = torch.arange((sets + 1) // 2, device=rng_key_B.device)
    word_W = torch.arange(words, device=rng_key_B.device)
    bits_BPW = hashed(rng_key_B[:, None, None], pair_P[:, None], word_W)
    # 63 random bits serve two sets. The word's number in the low bits makes sorting the keys sort the words, ties too.
    random_BSW = torch.stack(((bits_BPW & 0x7FFF_FFFF).int(), (bits_BPW >> 32).int()), 2).flatten(1, 2)[:, :sets]
    keys_BSW = (random_BSW >> _WORD_BITS << _WORD_BITS) | word_W.int()
    # numpy sorts with vector instructions: 50 times as fast as torch on a CPU.
    sorted_BSW = torch.as_tensor(np.sort(keys_BSW.numpy())) if keys_BSW.is_cpu else keys_BSW.sort().values
    return (sorted_BSW & (2**_WORD_BITS - 1)).long()


def _fill(size_NW: Tensor, room_N: Tensor) -> Tensor:
    """(N, W) bool: the words that a walk along each row takes, skipping every word that the room left cannot hold.

    A cumulative sum takes all words up to the first that overshoots; the room left then is smaller than that word, so
    it drops out for good, and the next round begins behind it: at most as many rounds as the longest word has tokens.
    """
    taken_NW = torch.zeros_like(size_NW, dtype=torch.bool)
    row_N = torch.arange(len(size_NW), device=size_NW.device)
    room_N = room_N.int()
    while len(row_N):
        fits_NW = size_NW <= room_N[:, None]
        filled_NW = (size_NW * fits_NW).cumsum(1, dtype=torch.int32)
        take_NW = fits_NW & (filled_NW <= room_N[:, None])
        taken_NW[row_N] |= take_NW
        room_N = room_N - (size_NW * take_NW).sum(1, dtype=torch.int32)
        size_NW = size_NW.masked_fill(take_NW, _TOO_LONG)
        more_N = (size_NW <= room_N[:, None]).any(1)
        row_N, size_NW, room_N = row_N[more_N], size_NW[more_N], room_N[more_N]
    return taken_NW
