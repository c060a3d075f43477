"""What `lodestar check` reads of a pre-training recipe. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lodestar.data.findings import Findings
from lodestar.data.readers import Row
from retrieval.check.training import CheckReport, TrainingTexts, check_training
from retromae.config import PretrainRecipe
from retromae.plan import plan
from retromae.text_check import TextCheck


@dataclass(frozen=True)
class RowTexts:
    """Row -> its text."""

    check: TextCheck

    def __call__(self, where: str, row: Row, findings: Findings) -> Mapping[str, Sequence[tuple[str, str]]] | None:
        checked = self.check(where, row, findings)
        return None if checked is None else {"text": [("", checked["text"])]}


def check(recipe: PretrainRecipe, world_size: int) -> CheckReport:
    """Read everything that the recipe names."""
    texts = RowTexts(TextCheck(recipe.data.field))
    training = TrainingTexts(recipe.data.train, texts, {"text": recipe.model.max_length}, plan)
    return check_training(recipe, recipe.data, training, world_size)
