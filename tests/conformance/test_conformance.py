"""What the optimizer gets from each loss is what its formula says, at any world size."""

from __future__ import annotations

from functools import partial

import pytest

from tests.conformance.losses import FORMULAS, LODESTAR, SENTENCE_TRANSFORMERS, scaled
from tests.conformance.problem import EVEN, FLAT, OTHER_TEMPERATURE, TEMPERATURE, UNEVEN, Loss, Outcome, outcomes, rows
from tests.conformance.table import read

WRONG = {"wrong factor": Loss(partial(scaled, LODESTAR["Lodestar"].step))}
LOSSES = LODESTAR | SENTENCE_TRANSFORMERS | FORMULAS | WRONG
Outcomes = dict[tuple[str, float], Outcome]


@pytest.fixture(scope="module")
def by_size() -> dict[int, Outcomes]:
    """Of all losses: one world of each size."""
    return {size: outcomes(LOSSES, counts) for size, counts in EVEN.items()}


def is_formula(outcome: Outcome) -> bool:
    return outcome.error < 1e-12 and outcome.factor == pytest.approx(1) and outcome.loss == pytest.approx(1)


@pytest.mark.parametrize("name", [*LODESTAR, *FORMULAS])
def test_ours_and_the_papers_gradients_are_the_formula_at_any_world_size(
    name: str, by_size: dict[int, Outcomes]
) -> None:
    for temperature in (TEMPERATURE, OTHER_TEMPERATURE, FLAT):
        assert all(is_formula(result[name, temperature]) for result in by_size.values())


def test_ours_is_the_formula_where_the_batch_does_not_divide() -> None:
    assert all(is_formula(outcome) for outcome in outcomes(LODESTAR, UNEVEN).values())


@pytest.mark.parametrize("name", [name for name in SENTENCE_TRANSFORMERS if "gathered" in name])
def test_so_is_sentence_transformers_with_gathered_embeddings(name: str, by_size: dict[int, Outcomes]) -> None:
    for result in by_size.values():
        outcome = result[name, TEMPERATURE]
        sum_of_widths = 2 if "Matryoshka" in name else 1
        assert is_formula(Outcome(outcome.factor / sum_of_widths, outcome.error, outcome.loss / sum_of_widths))


def test_a_wrong_factor_and_missing_negatives_are_found(by_size: dict[int, Outcomes]) -> None:
    for size in (2, 4):
        assert by_size[size]["wrong factor", TEMPERATURE].factor == pytest.approx(size)
        alone = by_size[size]["sentence-transformers MultipleNegativesRankingLoss", TEMPERATURE]
        assert not alone.exact and alone.error > 0.1


def test_the_table_of_the_documentation_is_fresh(by_size: dict[int, Outcomes]) -> None:
    table = read()
    computed = rows(LODESTAR | SENTENCE_TRANSFORMERS, by_size)
    stale = [name for name, cells in computed.items() if table[name][: len(cells)] != cells]
    assert not stale, f"{stale}: run make conformance"
    assert all(table[name][-1] == "1.00" for name in LODESTAR)
