"""The gradient that the optimizer gets, beside InfoNCE over the whole batch; peers.py prints it for all losses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.conformance.peers import EVEN, NAME, UNEVEN, Outcome, outcome


@pytest.mark.parametrize("name", ["Lodestar", "Lodestar, Matryoshka"])
@pytest.mark.parametrize("counts", [EVEN[2], EVEN[4], UNEVEN], ids=str)
def test_ours_is_the_reference_at_any_world_size(name: str, counts: Sequence[int]) -> None:
    result = outcome(name, counts)
    assert isinstance(result, Outcome) and result.error < 1e-12
    assert result.factor == pytest.approx(1) and result.loss == pytest.approx(1)


def test_so_is_sentence_transformers_with_gathered_embeddings_and_not_without() -> None:
    gathered, local = (outcome(f"{NAME} MultipleNegativesRankingLoss{rest}", EVEN[2]) for rest in ("", ", no gather"))
    assert isinstance(gathered, Outcome) and gathered.error < 1e-12 and gathered.factor == pytest.approx(1)
    assert isinstance(local, Outcome) and local.error > 0.1
