"""The recipe of a fine-tuning run. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import BatchConfig, EvaluateConfig, TrainingDataConfig, TrainingRecipe
from lodestar.config.values import LARGEST, Location, Width
from lodestar.errors import did_you_mean, shown
from retrieval.evaluation.config import METRICS

TILE_BYTES = 64 << 20
"""Memory limit of one tile of scores; the plan counts it, the loss observes it."""

Weight = Annotated[float, Field(ge=0, le=10**6)]
TextLength = Annotated[int, Field(ge=3, le=2**20)]


class LossConfig(Section):
    """The contrastive loss and its other terms."""

    temperature: Annotated[float, Field(ge=1e-4, le=100)] = 0.01
    """Divides the cosine of query and passage; smaller is sharper."""
    learn_temperature: bool = False
    """Learn the temperature, starting from the value above; checkpoints hold it."""
    share_negatives: bool = True
    """Score against the passages of all ranks; false: of this rank only, so the loss depends on the number of ranks."""
    passage_to_query: Weight = 0.0
    """Weight of the same loss from each positive passage to its query, against all queries; 1: symmetric."""
    query_to_query: Weight = 0.0
    """Weight of the loss that scores each query's passage against the other queries."""
    passage_to_passage: Weight = 0.0
    """Weight of the loss that scores each passage's query against the other passages."""
    distillation: Weight = 0.0
    """Weight of the KL divergence from the teacher's scores (pos_scores, neg_scores) over a query's own passages.
    The number of devices for FlagEmbedding's mixture with negatives across devices."""
    matryoshka: list[Width] = []
    """Widths at which all terms are computed besides the full width; all have the same weight."""


class WeightedDataset(Section):
    """One of several data sets."""

    path: Location
    """A file, glob, folder or hub name."""
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """How often its examples are drawn, relative to a data set of weight 1; of streams: how often its batches are."""
    in_batch_negatives: bool = True
    """false: each query is scored against its own passages only, as for classification data with few labels."""


class DataConfig(TrainingDataConfig):
    """Training files, instructions and lengths."""

    train: Annotated[list[Location | WeightedDataset], Field(min_length=1)]
    """BGE JSONL, or (anchor, positive, negative_1, ...) columns; each entry is a data set, each batch is of one."""
    negatives_per_query: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Negatives per example, drawn again in each epoch; repeated if an example has fewer, none if it has none."""
    query_instruction: str | None = None
    """Precedes each query, and becomes the model's prompt named query; none: the encoder's own, which its folder holds
    or, for a known hub name, its model card; "" for no instruction."""
    passage_instruction: str | None = None
    """The same for passages; the prompt named document."""
    query_max_length: TextLength | None = None
    """Tokens; none: model.max_length."""
    passage_max_length: TextLength | None = None
    """Tokens; none: model.max_length."""

    @property
    def sets(self) -> list[WeightedDataset]:
        """The entries of `train`, each as a section."""
        return [WeightedDataset(path=dataset) if isinstance(dataset, str) else dataset for dataset in self.train]

    def length(self, role: Literal["query", "passage"], default: int) -> int:
        """Tokens to which a text of this role is truncated."""
        return (self.query_max_length if role == "query" else self.passage_max_length) or default


class FinetuneBatchConfig(BatchConfig):
    """The global batch, and how devices cut it."""

    keep_graph: Annotated[float, Field(ge=0, le=LARGEST)] = 1.0
    """Micro-batches whose graphs GradCache keeps, so that it need not embed them twice. Below 1: as many as fit into
    this fraction of the device's memory; from 1 on: this many. The memory of one graph is needed anyway. Changes no
    result."""

    @model_validator(mode="after")
    def _fraction_or_whole_number(self) -> FinetuneBatchConfig:
        if self.keep_graph > 1 and self.keep_graph % 1:
            raise ValueError(
                f"keep_graph: must be a fraction below 1 or a whole number, got {self.keep_graph} (round it)"
            )
        return self


class FinetuneEvaluateConfig(EvaluateConfig):
    """Retrieval on a BEIR folder during training."""

    keep_best: str | None = None
    """A metric, as ndcg_at_10: model/ holds the model with its highest value, not the last model."""

    @field_validator("keep_best")
    @classmethod
    def _is_a_metric(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in METRICS:
            remedy = did_you_mean(metric, METRICS, f"take one of: {', '.join(METRICS)}")
            raise ValueError(f"not a metric, got {shown(metric)} ({remedy})")
        return metric


class FinetuneRecipe(TrainingRecipe):
    """Contrastive fine-tuning."""

    data: DataConfig
    loss: LossConfig = LossConfig()
    batch: FinetuneBatchConfig
    evaluate: FinetuneEvaluateConfig = FinetuneEvaluateConfig()

    @model_validator(mode="after")
    def _a_stream_has_steps(self) -> FinetuneRecipe:
        if self.data.streaming and self.schedule.steps is None:
            raise ValueError("data.streaming: a stream has no known length (set schedule.steps instead of epochs)")
        return self

    @model_validator(mode="after")
    def _keep_best_needs_data(self) -> FinetuneRecipe:
        if self.evaluate.keep_best and not self.evaluate.data:
            raise ValueError("evaluate.keep_best: needs evaluate.data (name a BEIR folder)")
        return self
