"""How the texts of a global batch go through the model: cut into micro-batches by length, and dealt to the ranks.

Every rank computes the same from the lengths alone. Numpy only.
Shape suffixes: N texts of a global batch, P micro-batches of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lodestar.config.schema import BatchPlan

Indices = npt.NDArray[np.int64]

MULTIPLE = 8
"""Widths of padded micro-batches are multiples of this many tokens, which suits matrix units."""
LENGTH_GROUPS = 4
"""Micro-batches, by length, of a rank whose texts fit into memory at once: less padding."""


@dataclass(frozen=True)
class Dealt:
    """The micro-batches of each rank, equally many: indices of texts, the longest texts first."""

    of_rank: list[list[Indices]]
    """A rank that has fewer than the others ends with empty ones."""
    numbers: list[list[int]]
    """Of each micro-batch among those of all ranks, by length: the key of its dropout."""
    tokens_of_rank: list[list[int]]
    """Tokens of each micro-batch, padding included."""
    fits_at_once: bool
    """Whether the texts of each rank fit into memory together."""

    @property
    def order(self) -> Indices:
        """(N,) the texts in the order of ranks, and of micro-batches on each."""
        return np.concatenate([indices for micro_batches in self.of_rank for indices in micro_batches])

    @property
    def texts_per_rank(self) -> list[int]:
        return [sum(map(len, micro_batches)) for micro_batches in self.of_rank]


def padded_width(longest: int) -> int:
    """Tokens of each text of a padded micro-batch whose longest text has `longest`."""
    return -(-max(1, longest) // MULTIPLE) * MULTIPLE


def deal(lengths_N: npt.ArrayLike, plan: BatchPlan, *, packed: bool = False) -> Dealt:
    """Sort all texts by length, cut them into micro-batches, and give each rank equally many of nearly equal cost.

    By `plan.micro_tokens` no micro-batch holds more tokens, unless it is a single text; by `plan.micro_size` all hold
    nearly equally many texts. A micro-batch may hold fewer than the limit allows, so that every rank has as much to do.

    lengths_N   tokens of each text
    packed      micro-batches hold no padding
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    by_length = np.argsort(-lengths_N, kind="stable")
    sorted_N, ranks = lengths_N[by_length], plan.world_size

    def cut(per_rank: int) -> Dealt:
        """Into so many for each rank."""
        parts = per_rank * ranks
        if plan.micro_tokens is None or per_rank != needed:
            bounds = np.unique(np.arange(parts + 1) * len(sorted_N) // parts)
        else:
            bounds = _balanced_cuts(sorted_N, plan.micro_tokens, parts, packed)
        micro_batches = [by_length[start:end] for start, end in pairwise(bounds)]
        costs = [_tokens(lengths_N[indices], packed) for indices in micro_batches]
        return Dealt(*_dealt(micro_batches, costs, ranks, per_rank), fits_at_once=per_rank != needed or needed == 1)

    if plan.micro_tokens is None:
        needed = plan.num_micro_batches()
    else:
        needed = -(-(len(_cuts(sorted_N, plan.micro_tokens, packed)) - 1) // ranks)
    can_group = len(sorted_N) >= 8 * LENGTH_GROUPS * ranks and not packed
    if can_group and (needed == 1 or plan.micro_tokens is not None):
        grouped = cut(LENGTH_GROUPS)
        most_tokens = max(map(sum, grouped.tokens_of_rank))
        if needed == 1 or most_tokens <= (plan.micro_tokens or 0):
            return grouped
    return cut(needed)


def _dealt(
    micro_batches: Sequence[Indices], costs: Sequence[int], ranks: int, per_rank: int
) -> tuple[list[list[Indices]], list[list[int]], list[list[int]]]:
    """In rounds, the most expensive first: in each, the rank with the least so far gets the most expensive one."""
    of_rank: list[list[Indices]] = [[] for _ in range(ranks)]
    numbers: list[list[int]] = [[] for _ in range(ranks)]
    tokens_of_rank: list[list[int]] = [[] for _ in range(ranks)]
    by_cost = np.argsort(-np.array(costs), kind="stable").tolist()
    for start in range(0, per_rank * ranks, ranks):
        in_round = by_cost[start : start + ranks]
        by_load = sorted(range(ranks), key=lambda rank: sum(tokens_of_rank[rank]))
        for place, rank in enumerate(by_load):
            is_real = place < len(in_round)
            number = in_round[place] if is_real else start + place
            of_rank[rank].append(micro_batches[number] if is_real else np.empty(0, dtype=np.int64))
            numbers[rank].append(number)
            tokens_of_rank[rank].append(costs[number] if is_real else 0)
    return of_rank, numbers, tokens_of_rank


def _tokens(lengths_B: Indices, packed: bool) -> int:
    return int(lengths_B.sum()) if packed else len(lengths_B) * padded_width(int(lengths_B.max()))


def _cuts(sorted_N: Indices, limit: int, packed: bool) -> list[int]:
    """Bounds of the fewest contiguous parts of at most `limit` tokens; lengths fall, so a part's first is its width."""
    total_N = np.concatenate([[0], np.cumsum(sorted_N)])
    bounds = [0]
    while (start := bounds[-1]) < len(sorted_N):
        if packed:
            end = int(np.searchsorted(total_N, total_N[start] + limit, side="right")) - 1
        else:
            end = start + limit // padded_width(int(sorted_N[start]))
        bounds.append(min(max(end, start + 1), len(sorted_N)))
    return bounds


def _balanced_cuts(sorted_N: Indices, limit: int, parts: int, packed: bool) -> list[int]:
    """Bounds of at most `parts` contiguous parts, the largest of which is as small as it can be."""
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(sorted_N, middle, packed)) - 1 <= parts:
            high = middle
        else:
            low = middle + 1
    return _cuts(sorted_N, high, packed)
