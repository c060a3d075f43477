"""The plan of a run as text."""

from __future__ import annotations

from lodestar.config.schema import BatchPlan
from lodestar.planning.plan import batch_in_words


def test_the_batch_in_words() -> None:
    examples = BatchPlan(32768, 48, 171).examples_per_rank
    plan = {"global_size": 32768, "chunks_per_rank": 4, "negatives_per_query": 65535, "rows_per_rank": examples}
    assert batch_in_words(plan) == (
        "global batch: 32,768 = 32 x 683 + 16 x 682 queries; 4 micro-batches a step; 65,535 negatives each"
    )
    plan = {"global_size": 720, "chunks_per_rank": 1, "negatives_per_query": 0, "rows_per_rank": [30] * 24}
    assert batch_in_words(plan) == "global batch: 720 = 24 x 30 texts; 1 micro-batch a step"
