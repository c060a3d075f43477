"""Which candidates are negatives of which anchors: those with equal texts are not.

Shape suffixes: B anchors on this rank, M candidates (of all ranks), R anchors that are treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NegativeMask:
    """Which texts are equal, by content hash, so that no text is pushed away from its own answer. All int64."""

    anchor_B: Tensor
    """Hash of each anchor's text."""
    answer_B: Tensor
    """Hash of the text that answers it."""
    same_query_B: Tensor
    """A candidate with this owner belongs to the same query as the anchor."""
    candidate_M: Tensor
    """Hash of each candidate's text."""
    owner_M: Tensor
    """Hash of the text that a candidate answers, as a passage its query; -1 where it came as a negative."""
    positive_index_B: Tensor
    """The candidate that is never a negative: the answer where it is one of them, or the anchor itself."""
    in_row_only_B: Tensor
    """Bool: this anchor sees only the candidates of its own row."""
    start_B: Tensor
    """Where those begin among the M candidates, ..."""
    end_B: Tensor
    """... and end; neither is looked at where in_row_only_B is false."""

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
        """(R, M) bool, false at `positive_index_B`: the anchor sees its own row only, the candidate is not in it."""
        column_M = torch.arange(len(self.candidate_M), device=self.candidate_M.device)
        outside_RM = column_M < self.start_B[rows_R, None]
        outside_RM |= column_M >= self.end_B[rows_R, None]
        outside_RM &= self.in_row_only_B[rows_R, None]
        return outside_RM.scatter_(1, self.positive_index_B[rows_R, None], False)

    def has_duplicates(self) -> Tensor:
        """(B,) bool: whether `equal` holds anywhere in an anchor's row; by sorting, without looking at all pairs."""
        has_duplicates_B = _elsewhere(self.candidate_M, self.answer_B, self.positive_index_B)
        has_duplicates_B |= _elsewhere(self.candidate_M, self.anchor_B, self.positive_index_B)
        return has_duplicates_B | _elsewhere(self.owner_M, self.same_query_B, self.positive_index_B)


def _elsewhere(column_M: Tensor, wanted_B: Tensor, positive_index_B: Tensor) -> Tensor:
    """(B,) bool: whether the column holds an anchor's hash anywhere but at its own place."""
    sorted_M = column_M.sort().values
    found_B = torch.searchsorted(sorted_M, wanted_B, right=True) - torch.searchsorted(sorted_M, wanted_B)
    return found_B > (column_M[positive_index_B] == wanted_B)
