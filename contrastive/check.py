"""What `lodestar check` reads of a fine-tuning recipe. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar.data.findings import Findings
from lodestar.data.readers import Row
from lodestar.data.training_examples import check_row, instructions
from retrieval.check.training import CheckReport, TrainingTexts, check_training
from retrieval.embedding.known_models import resolve_prompts


@dataclass(frozen=True)
class ExampleTexts:
    """Row -> its queries and passages, with their instructions."""

    query_instruction: str
    passage_instruction: str

    def __call__(self, where: str, row: Row, findings: Findings) -> Mapping[str, Sequence[tuple[str, str]]] | None:
        example = check_row(where, row, findings)
        if example is None:
            return None
        both = self.query_instruction, self.passage_instruction
        before_query, before_passage = instructions(example["type"], example["prompt"], *both)
        passages = [(before_passage, text) for text in (*example["pos"], *example["neg"])]
        return {"query": [(before_query, example["query"])], "passage": passages}


def check(recipe: FinetuneRecipe, world_size: int) -> CheckReport:
    """Read everything that the recipe names."""
    data, prompts = recipe.data, resolve_prompts(recipe.model.encoder, None)
    own = (data.query_instruction, prompts.get("query")), (data.passage_instruction, prompts.get("document"))
    training = TrainingTexts(
        [dataset.path for dataset in data.sets],
        ExampleTexts(*(first if first is not None else second or "" for first, second in own)),
        {role: data.length(role, recipe.model.max_length) for role in ("query", "passage")},
        plan,
    )
    return check_training(recipe, data, training, world_size)
