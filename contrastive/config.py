"""The recipe of a fine-tuning run. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import (
    BatchConfig,
    Count,
    EvaluateConfig,
    Natural,
    Positive,
    TrainingDataConfig,
    TrainingRecipe,
)

TILE_BYTES = 64 << 20
"""Memory of one tile of scores; the plan counts it, the loss keeps to it."""


Weight = Annotated[float, Field(ge=0)]


class LossConfig(Section):
    temperature: Positive = 0.01
    """Divides the cosine of query and passage; smaller is sharper."""
    learn_temperature: bool = False
    """Train it too, from the value above on; it is kept in checkpoints."""
    share_negatives: bool = True
    """Score against the passages of all ranks; false: of this rank alone, which depends on the number of ranks."""
    passage_to_query: Weight = 0.0
    """Weight of the same loss from each positive passage to its query, against all queries; 1: symmetric."""
    query_to_query: Weight = 0.0
    """Weight of the loss that scores each query's passage against the other queries."""
    passage_to_passage: Weight = 0.0
    """Weight of the loss that scores each passage's query against the other passages."""
    distillation: Weight = 0.0
    """Weight of the KL divergence from the teacher's scores (pos_scores, neg_scores) over a row's own passages."""
    matryoshka: list[Count] = []
    """Widths besides the full one at which the loss is taken too; all count the same."""


class WeightedDataset(Section):
    path: str
    """A file, glob, folder or hub name."""
    weight: Positive = 1.0
    """How often its rows are drawn, relative to a data set of weight 1."""
    in_batch_negatives: bool = True
    """false: its queries see only the passages of their own row, as for classes with few labels."""


class DataConfig(TrainingDataConfig):
    train: Annotated[list[str | WeightedDataset], Field(min_length=1)]
    """BGE JSONL, or (anchor, positive, negative_1, ...) columns; each entry is a data set, each batch is of one."""
    negatives_per_query: Natural = 1
    """Of each row, drawn anew in each epoch; repeated where a row has fewer, none where it has none."""
    query_instruction: str = ""
    """Put before each query, and kept in the model as its prompt named query."""
    passage_instruction: str = ""
    query_max_length: Count | None = None
    """Tokens; none: model.max_length."""
    passage_max_length: Count | None = None

    @property
    def sets(self) -> list[WeightedDataset]:
        """The entries of `train`, each with its weight."""
        return [WeightedDataset(path=each) if isinstance(each, str) else each for each in self.train]

    def length(self, role: Literal["query", "passage"], otherwise: int) -> int:
        """Tokens that a text of this role is cut to."""
        return (self.query_max_length if role == "query" else self.passage_max_length) or otherwise


class FinetuneBatchConfig(BatchConfig):
    keep_graph: Annotated[float, Field(ge=0)] = 0.0
    """Micro-batches whose first pass is kept, and so not computed twice: below 1 as many as fit into this share of the
    device's memory, from 1 on so many. Changes no result."""

    @model_validator(mode="after")
    def _share_or_number(self) -> FinetuneBatchConfig:
        if self.keep_graph > 1 and self.keep_graph % 1:
            raise ValueError(f"keep_graph is a share below 1 or a whole number, got {self.keep_graph}")
        return self


class FinetuneEvaluateConfig(EvaluateConfig):
    keep_best: str | None = None
    """A metric, as ndcg_at_10: model/ becomes the best evaluated model, not the last."""


class FinetuneRecipe(TrainingRecipe):
    """Contrastive fine-tuning."""

    data: DataConfig
    loss: LossConfig = LossConfig()
    batch: FinetuneBatchConfig
    evaluate: FinetuneEvaluateConfig = FinetuneEvaluateConfig()

    @model_validator(mode="after")
    def _best_of_something(self) -> FinetuneRecipe:
        if self.evaluate.keep_best and not self.evaluate.data:
            raise ValueError("evaluate.keep_best needs evaluate.data (name a BEIR folder)")
        return self
