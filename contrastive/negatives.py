"""Which candidates are negatives of which anchors: equal texts are not.

Shape suffixes: B anchors on this rank, M candidates (of all ranks), R some of the anchors, C consecutive candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NegativeMask:
    """Which pairs are no negatives, by content hash, so that no text is pushed from its own answer. Tensors: int64."""

    anchor_B: Tensor
    """Hash of each anchor's text."""
    answer_B: Tensor
    """Hash of the text that answers it."""
    same_query_B: Tensor
    """Hash by which a candidate's `owner_M` shows that it belongs to the anchor's query."""
    candidate_M: Tensor
    """Hash of each candidate's text."""
    owner_M: Tensor
    """Hash of the text that a candidate answers, as a passage its query; -1 for a negative."""
    positive_index_B: Tensor
    """Index of the candidate that is never a negative: the answer if it is a candidate, else the anchor itself."""
    in_row_only: bool
    """Anchors are scored only against the candidates of their own data row, [start, end)."""
    start_B: Tensor
    """Index of the first candidate of the row; ignored unless in_row_only."""
    end_B: Tensor
    """Index after the last candidate of the row; ignored unless in_row_only."""

    def not_negative(self) -> Tensor:
        """(B, M) bool: the pairs that are no negatives, as `info_nce` takes them; false at `positive_index_B`."""
        rows_B, all_M = torch.arange(len(self.positive_index_B), device=self.positive_index_B.device), slice(None)
        equal_BM = self.equal(rows_B, all_M)
        return equal_BM | self.outside(rows_B, all_M) if self.in_row_only else equal_BM

    def equal(self, rows_R: Tensor, columns: slice) -> Tensor:
        """(R, C) bool, false at `positive_index_B`: the candidate's text is the answer's or the anchor's, or it belongs
        to the same query."""
        candidate_C = self.candidate_M[columns]
        equal_RC = candidate_C == self.answer_B[rows_R, None]
        equal_RC |= candidate_C == self.anchor_B[rows_R, None]
        equal_RC |= self.owner_M[columns] == self.same_query_B[rows_R, None]
        return self.fill_positive(equal_RC, rows_R, columns, False)

    def outside(self, rows_R: Tensor, columns: slice) -> Tensor:
        """(R, C) bool, false at `positive_index_B`: the candidate is of another data row than the anchor."""
        index_C = torch.arange(len(self.candidate_M), device=self.candidate_M.device)[columns]
        outside_RC = index_C < self.start_B[rows_R, None]
        outside_RC |= index_C >= self.end_B[rows_R, None]
        return self.fill_positive(outside_RC, rows_R, columns, False)

    def fill_positive(self, x_RC: Tensor, rows_R: Tensor, columns: slice, value: float) -> Tensor:
        """x_RC itself, now with `value` at `positive_index_B` where that is among the columns."""
        index_R1 = self.positive_index_B[rows_R, None] - (columns.start or 0)
        column_R1 = index_R1.clamp(0, x_RC.shape[1] - 1)
        return x_RC.scatter_(1, column_R1, x_RC.gather(1, column_R1).masked_fill_(index_R1 == column_R1, value))

    def has_duplicates(self) -> Tensor:
        """(B,) bool: whether `equal` has a true value for an anchor; by sorting, without comparing all pairs."""
        has_duplicates_B = _occurs_elsewhere(self.candidate_M, self.answer_B, self.positive_index_B)
        has_duplicates_B |= _occurs_elsewhere(self.candidate_M, self.anchor_B, self.positive_index_B)
        return has_duplicates_B | _occurs_elsewhere(self.owner_M, self.same_query_B, self.positive_index_B)


def _occurs_elsewhere(hash_M: Tensor, hash_B: Tensor, positive_index_B: Tensor) -> Tensor:
    """(B,) bool: whether hash_M holds an anchor's hash at any other index than positive_index_B."""
    sorted_M = hash_M.sort().values
    count_B = torch.searchsorted(sorted_M, hash_B, right=True) - torch.searchsorted(sorted_M, hash_B)
    return count_B > (hash_M[positive_index_B] == hash_B)
