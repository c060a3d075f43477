"""The recipe of an evaluation. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import Count, EvaluateConfig
from retrieval.embedding.config import Prompts
from retrieval.evaluation.significance import Bootstrap
from retrieval.evaluation.tasks import AnyTask, Retrieval


class EvaluateRecipe(Section):
    """Models that are trained already, and what they are measured by."""

    models: Annotated[list[str] | dict[str, str], Field(min_length=1)]
    """Folders (or hub names) in sentence-transformers' format; or the same, each under a label."""
    prompts: dict[str, Prompts] = {}
    """By a model's label (or name), in place of its folder's own."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Retrieval on one BEIR folder."""
    tasks: dict[str, AnyTask] = {}
    """More to measure, each under a label."""
    bm25: bool = True
    """Beside each retrieval also BM25, and its mix with the last model."""
    bootstrap: Bootstrap = Bootstrap()
    """Each row's difference to the first model."""
    output_dir: str | None = None
    """Where evaluation.json and reports go; embeddings stay there until the end, for a run that is interrupted."""
    precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    batch_tokens: Count | None = None
    """Tokens at once on a device, padding counted; none: 4,096 on a CPU, 65,536 on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""

    @model_validator(mode="after")
    def _on_something(self) -> EvaluateRecipe:
        if of_training := self.evaluate.model_fields_set & {"batch_size", "every_steps", "at_start"}:
            raise ValueError(f"evaluate.{min(of_training)}: only for training (here batch_tokens bounds memory)")
        if not self.all_tasks:
            raise ValueError("needs evaluate.data (name a BEIR folder) or tasks")
        if len(self.all_tasks) == len(self.tasks) and self.evaluate.data:
            raise ValueError(
                f"tasks.{Path(self.evaluate.data).resolve().name}: evaluate.data has that name (take another)"
            )
        if unknown := sorted(self.prompts.keys() - self.labelled.keys()):
            raise ValueError(f"prompts.{unknown[0]}: no model of that label (there: {', '.join(self.labelled)})")
        return self

    @property
    def all_tasks(self) -> dict[str, AnyTask]:
        """That of `evaluate` first, under its folder's name."""
        if self.evaluate.data is None:
            return self.tasks
        kept = self.evaluate.model_dump(include={"data", "split", "max_queries", "max_documents"})
        return {Path(self.evaluate.data).resolve().name: Retrieval(kind="retrieval", **kept), **self.tasks}

    @property
    def labelled(self) -> dict[str, str]:
        return self.models if isinstance(self.models, dict) else {path: path for path in self.models}
