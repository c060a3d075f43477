"""Which texts are negatives of which: equal ones are not.

Shape suffixes: B anchors on this rank, M candidates (of all ranks), R positions of anchors that are treated alike,
N texts, Q queries of this rank, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Which texts are the same, by content hash, so that no text is pushed away from its own answer. All int64."""

    anchor_B: Tensor
    """Hash of each anchor's text."""
    answer_B: Tensor
    """Hash of the text that answers it."""
    kin_B: Tensor
    """A candidate of this owner answers, or asks, the same as the anchor."""
    candidate_M: Tensor
    """Hash of each candidate's text."""
    owner_M: Tensor
    """Hash of the text that a candidate belongs to, as a passage to its query; -1 where it came as a negative."""
    own_B: Tensor
    """The candidate that is no negative in any case: the answer where it is one of them, or the anchor itself."""
    alone_B: Tensor
    """Bool: this anchor sees only the candidates of its own row."""
    start_B: Tensor
    """Where those begin among the M candidates, ..."""
    end_B: Tensor
    """... and end; neither is looked at where alone_B is false."""

    def hidden(self) -> Tensor:
        """(B, M) bool: the pairs that are no negatives, as `info_nce` takes them; false at `own_B`."""
        rows_B = torch.arange(len(self.own_B), device=self.own_B.device)
        return self.equal(rows_B) | self.outside(rows_B)

    def equal(self, rows_R: Tensor) -> Tensor:
        """(R, M) bool, false at `own_B`: the candidate is the answer's text, or the anchor's, or is of its kin."""
        equal_RM = self.candidate_M == self.answer_B[rows_R, None]
        equal_RM |= self.candidate_M == self.anchor_B[rows_R, None]
        equal_RM |= self.owner_M == self.kin_B[rows_R, None]
        return equal_RM.scatter_(1, self.own_B[rows_R, None], False)

    def outside(self, rows_R: Tensor) -> Tensor:
        """(R, M) bool, false at `own_B`: the anchor is alone, and the candidate is not of its row."""
        column_M = torch.arange(len(self.candidate_M), device=self.candidate_M.device)
        outside_RM = column_M < self.start_B[rows_R, None]
        outside_RM |= column_M >= self.end_B[rows_R, None]
        outside_RM &= self.alone_B[rows_R, None]
        return outside_RM.scatter_(1, self.own_B[rows_R, None], False)

    def touched(self) -> Tensor:
        """(B,) bool: whether `equal` holds anywhere in an anchor's row; by sorting, without looking at all pairs."""
        touched_B = _elsewhere(self.candidate_M, self.answer_B, self.own_B)
        touched_B |= _elsewhere(self.candidate_M, self.anchor_B, self.own_B)
        return touched_B | _elsewhere(self.owner_M, self.kin_B, self.own_B)


def _elsewhere(column_M: Tensor, wanted_B: Tensor, own_B: Tensor) -> Tensor:
    """(B,) bool: whether the column holds an anchor's hash anywhere but at its own place."""
    sorted_M = column_M.sort().values
    found_B = torch.searchsorted(sorted_M, wanted_B, right=True) - torch.searchsorted(sorted_M, wanted_B)
    return found_B > (column_M[own_B] == wanted_B)


class Texts(NamedTuple):
    """Queries or passages: what they say, by hash, and their embeddings."""

    hash_N: Tensor
    x_ND: Tensor


@dataclass(frozen=True)
class Candidates:
    """Texts of all ranks that can be negatives."""

    texts: Texts
    owner_M: Tensor
    own_Q: Tensor
    """Where this rank's queries, or their positives, are among them."""
    kin_Q: Tensor
    """The owner that makes a candidate no negative, for each of this rank's queries."""


@dataclass(frozen=True)
class Direction:
    """Anchors, each with its answer, against candidates."""

    name: str
    anchor: Texts
    answer: Texts
    candidates: Candidates
    alone_Q: Tensor
    count_Q: Tensor
    """How many candidates, from its own on, an anchor sees that is alone."""

    def identity(self) -> Identity:
        of = self.candidates
        return Identity(
            anchor_B=self.anchor.hash_N,
            answer_B=self.answer.hash_N,
            kin_B=of.kin_Q,
            candidate_M=of.texts.hash_N,
            owner_M=of.owner_M,
            own_B=of.own_Q,
            alone_B=self.alone_Q,
            start_B=of.own_Q,
            end_B=of.own_Q + self.count_Q,
        )
