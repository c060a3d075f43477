"""The choice of a query's negatives among its nearest texts."""

from __future__ import annotations

import numpy as np

from retrieval.mining.config import MineConfig
from retrieval.mining.shard_search import choose_negatives


def test_a_margin_never_admits_a_text_that_scores_above_the_positive() -> None:
    config = MineConfig(first_rank=0, relative_margin=0.95, pick="top")
    scores, rows = np.array([-0.05, -0.097, -0.2], dtype=np.float32), np.arange(3)
    assert choose_negatives(scores, rows, set(), -0.1, config, np.zeros(3)).tolist() == [2]
    assert choose_negatives(scores + 0.3, rows, set(), 0.2, config, np.zeros(3)).tolist() == [2]
