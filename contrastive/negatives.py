"""Which candidates are negatives of which anchors: equal texts are not.

Shape suffixes: B anchors on this rank, M candidates (of all ranks), R anchors with the same masking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NegativeMask:
    """Which pairs are no negatives, by content hash, so that no text is pushed from its own answer. Fields: int64."""

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
    in_row_only_B: Tensor
    """Bool: this anchor is scored only against the candidates of its own data row, [start, end)."""
    start_B: Tensor
    """Index of the first candidate of the row; ignored where in_row_only_B is false."""
    end_B: Tensor
    """Index after the last candidate of the row; ignored where in_row_only_B is false."""

    def not_negative(self) -> Tensor:
        """(B, M) bool: the pairs that are no negatives, as `info_nce` takes them; false at `positive_index_B`."""
        rows_B = torch.arange(len(self.positive_index_B), device=self.positive_index_B.device)
        return self.equal(rows_B) | self.outside(rows_B)

    def equal(self, rows_R: Tensor) -> Tensor:
        """(R, M) bool, false at `positive_index_B`: the candidate's text is the answer's or the anchor's, or it belongs
        to the same query."""
        equal_RM = self.candidate_M == self.answer_B[rows_R, None]
        equal_RM |= self.candidate_M == self.anchor_B[rows_R, None]
        equal_RM |= self.owner_M == self.same_query_B[rows_R, None]
        return equal_RM.scatter_(1, self.positive_index_B[rows_R, None], False)

    def outside(self, rows_R: Tensor) -> Tensor:
        """(R, M) bool, false at `positive_index_B`: the anchor is scored in its own row only, without the candidate."""
        index_M = torch.arange(len(self.candidate_M), device=self.candidate_M.device)
        outside_RM = index_M < self.start_B[rows_R, None]
        outside_RM |= index_M >= self.end_B[rows_R, None]
        outside_RM &= self.in_row_only_B[rows_R, None]
        return outside_RM.scatter_(1, self.positive_index_B[rows_R, None], False)

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
