"""The recipe of mining. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import Count, Natural, Positive
from retrieval.embedding.config import EncodeConfig as Encode
from retrieval.embedding.config import Prompts


class Mine(Section):
    negatives: Count = 15
    """Of each row; fewer where the window and the margins leave fewer."""
    first_rank: Natural = 10
    """Ranks before this one are passed over: they may be answers that nobody marked. Known positives have no rank."""
    last_rank: Count = 210
    pick: Literal["random", "top"] = "random"
    """Which of those in the window."""
    margin: Positive | None = None
    """Pass over what scores more than the positive (of several the lowest) less this; none: do not."""
    relative_margin: Annotated[float, Field(gt=0, le=1)] | None = None
    """Pass over what scores more than this share of the positive; NV-Retriever takes 0.95."""
    seed: int = 42
    block_rows: Count = 50_000
    """Most queries that are searched at once; what an interrupted run has to do again on each rank."""

    @model_validator(mode="after")
    def _window(self) -> Mine:
        if self.last_rank <= self.first_rank:
            raise ValueError(f"last_rank must lie above first_rank, got {self.last_rank} and {self.first_rank}")
        return self


class MineRecipe(Section):
    """Hard negatives for a training file."""

    model: str
    """A sentence-transformers folder or hub name: the one that is to be trained on, or a better one."""
    data: Annotated[list[str], Field(min_length=1)]
    """BGE JSONL, or (anchor, positive) columns; negatives that rows have already are replaced."""
    corpus: list[str] | None = None
    """Where negatives come from: files with `text`, or a BEIR folder; none: all passages of `data`."""
    output: str
    """The JSONL file; embeddings and finished parts stay in a folder of its name with .work until you delete it."""
    mine: Mine = Mine()
    encode: Encode = Encode()
    prompts: Prompts = {}
    cross_encoder: str | None = None
    """A sentence-transformers CrossEncoder whose logits go into the file, not the model's scores: the teacher of
    loss.distillation."""

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.work")
