"""The recipe of an evaluation. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import EvaluateConfig, Precision
from lodestar.config.values import Count, Label, Location, Name, Seed
from retrieval.embedding.config import Prompts

METRICS = tuple(f"{name}_at_{k}" for k in (10, 100) for name in ("ndcg", "mrr", "recall", "precision", "map"))
"""Of retrieval, as `metrics.metrics` names them."""

# --- tasks -----------------------------------------------------------------------------------


class RetrievalConfig(Section):
    kind: Literal["retrieval"]
    data: Location
    """A folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/*.tsv, gz or not."""
    split: Name = "test"
    """Which file of qrels/."""
    max_queries: Count | None = None
    """Use only the first so many queries; none: all."""
    max_documents: Count | None = None
    """Use only the documents that answer those queries and the first others, up to so many; none: all."""


class LabelledTextsConfig(Section):
    text: str = "text"
    """The field of a row that holds its text."""
    label: str = "label"
    """The field that holds its label, a text or a whole number."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class ClassificationConfig(LabelledTextsConfig):
    """Logistic regression on the embeddings of a few texts of each label."""

    kind: Literal["classification"]
    train: Location
    """JSONL, Parquet, a folder or a glob of them, or a data set of the hub; the same holds for every file of a task."""
    test: Location
    samples_per_label: Count = 8
    """Texts of each label in one training set."""
    experiments: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Number of training sets to draw; metrics are means over them."""


class ClusteringConfig(LabelledTextsConfig):
    """k-means with as many clusters as there are labels."""

    kind: Literal["clustering"]
    data: Location


class PairsConfig(Section):
    data: Location
    sentence1: str = "sentence1"
    """The field of a row that holds its first text."""
    sentence2: str = "sentence2"


class StsConfig(PairsConfig):
    """How well cosines order pairs as human similarity scores do."""

    kind: Literal["sts"]
    score: str = "score"
    """The field that holds a number: the larger, the more similar."""


class PairClassificationConfig(PairsConfig):
    """How well a cosine separates pairs that belong together (1) from others (0)."""

    kind: Literal["pair_classification"]
    label: str = "label"
    """The field that holds 0 or 1."""


TaskConfig = Annotated[
    RetrievalConfig | ClassificationConfig | ClusteringConfig | StsConfig | PairClassificationConfig,
    Field(discriminator="kind"),
]
"""A new kind of task also needs a reader in `retrieval.evaluation.tasks.READERS`."""

# --- the recipe ------------------------------------------------------------------------------


class BootstrapConfig(Section):
    resamples: Annotated[int, Field(ge=0, le=10**6)] = 10_000
    """0: no comparison."""
    baselines: list[str] = []
    """Labels of rows that the others are compared with, `BM25` among them; none: the first model."""
    seed: Seed = 42


class EvaluateRecipe(Section):
    """Trained models, and the tasks that measure them."""

    models: Annotated[list[Location] | dict[Label, Location], Field(min_length=1)]
    """Folders (or hub names) in sentence-transformers' format; or a mapping from labels to them."""
    prompts: dict[str, Prompts] = {}
    """By a model's label (or name); replace the prompts of its folder."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Retrieval on one BEIR folder."""
    tasks: dict[Label, TaskConfig] = {}
    """More tasks, each under a label."""
    bm25: bool = True
    """Add BM25 to each retrieval task, and its fusion with the last model."""
    fusion: Literal["scores", "rrf"] = "scores"
    """scores: standardised scores are added up; rrf: reciprocal ranks, as vector databases do."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """Statistical significance of the differences between rows."""
    output_dir: Location | None = None
    """Where evaluation.json and reports go. Embeddings stay there until the end, for an interrupted run."""
    search_cache: bool = False
    """Also write the embeddings of each corpus into the cache of `lodestar search`, beside each local model."""
    precision: Precision = "fp32"
    batch_tokens: Count | None = None
    """Tokens of one batch on a device, padding included; none: 2,048 on a CPU, 65,536 on a GPU."""
    device: str = "auto"
    """auto: a GPU for each rank if there are any; or one device, as cpu or cuda:1."""

    @model_validator(mode="after")
    def _has_a_task(self) -> EvaluateRecipe:
        if training_only := self.evaluate.model_fields_set & {"batch_size", "every_steps", "at_start"}:
            raise ValueError(
                f"evaluate.{min(training_only)}: only for training (leave it out: here batch_tokens bounds memory)"
            )
        if not self.all_tasks:
            raise ValueError("needs evaluate.data or tasks (name a BEIR folder)")
        if len(self.all_tasks) == len(self.tasks) and self.evaluate.data:
            raise ValueError(
                f"tasks.{Path(self.evaluate.data).resolve().name}: evaluate.data has that name (take another)"
            )
        limited = any(isinstance(task, RetrievalConfig) and task.max_documents for task in self.all_tasks.values())
        if self.search_cache and (self.precision != "fp32" or self.prompts or limited):
            problem = "search embeds whole corpora in fp32 with the model's own prompts"
            raise ValueError(f"search_cache: {problem} (drop precision, prompts and max_documents, or set it to false)")
        if unknown := sorted(self.prompts.keys() - self.labelled_models.keys()):
            raise ValueError(
                f"prompts.{unknown[0]}: no model has that label (known: {', '.join(self.labelled_models)})"
            )
        known = ["BM25"] * self.bm25 + list(self.labelled_models)
        if unknown := sorted(set(self.bootstrap.baselines) - set(known)):
            raise ValueError(f"bootstrap.baselines: {unknown[0]}: no row has that label (known: {', '.join(known)})")
        return self

    @property
    def all_tasks(self) -> dict[str, TaskConfig]:
        """That of `evaluate` first, under its folder's name."""
        if self.evaluate.data is None:
            return self.tasks
        values = self.evaluate.model_dump(include={"data", "split", "max_queries", "max_documents"})
        return {Path(self.evaluate.data).resolve().name: RetrievalConfig(kind="retrieval", **values), **self.tasks}

    @property
    def baselines(self) -> list[str]:
        return self.bootstrap.baselines or list(self.labelled_models)[:1]

    @property
    def labelled_models(self) -> dict[str, str]:
        return self.models if isinstance(self.models, dict) else {path: path for path in self.models}
