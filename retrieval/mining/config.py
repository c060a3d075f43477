"""The recipe of mining. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.values import Count, Location, Natural, Positive, Seed
from retrieval.embedding.config import EncodeConfig, EncodeRecipe, OutputConfig, Prompts


class MineConfig(Section):
    negatives: Annotated[int, Field(ge=1, le=10_000)] = 15
    """Of each query; fewer where the window and the margins leave fewer."""
    first_rank: Natural = 10
    """Skip the ranks before this one: they may be unlabelled answers. Known positives have no rank."""
    last_rank: Count = 210
    """Where the window of ranks ends."""
    pick: Literal["random", "top"] = "random"
    """Which texts of the window."""
    margin: Positive | None = None
    """Skip texts that score above the positive (of several the lowest) less this; none: skip none."""
    relative_margin: Annotated[float, Field(gt=0, le=1)] | None = None
    """Skip texts that score above this fraction of the positive's score; NV-Retriever takes 0.95."""
    seed: Seed = 42
    block_rows: Count = 50_000
    """Queries searched at once, at most; an interrupted run repeats up to so many on each rank."""

    @model_validator(mode="after")
    def _window(self) -> MineConfig:
        if self.last_rank <= self.first_rank:
            raise ValueError(
                f"last_rank must lie above first_rank, got {self.last_rank} and {self.first_rank} (raise last_rank)"
            )
        return self


class MineRecipe(Section):
    """Hard negatives for a training file."""

    model: Location
    """A sentence-transformers folder or hub name: the model that training starts from, or a better one."""
    data: Annotated[list[Location], Field(min_length=1)]
    """BGE JSONL, or (anchor, positive) columns; the new negatives replace those that rows have."""
    corpus: Annotated[list[Location], Field(min_length=1)] | None = None
    """Where negatives come from: files with `text`, or a BEIR folder; none: all passages of `data`."""
    output: Location
    """The JSONL file; embeddings and finished parts stay in OUTPUT.work until you delete it."""
    mine: MineConfig = MineConfig()
    encode: EncodeConfig = EncodeConfig()
    prompts: Prompts = {}
    cross_encoder: Location | None = None
    """A sentence-transformers CrossEncoder whose logits replace the model's scores in the file: the teacher of
    loss.distillation."""

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.work")

    @property
    def corpus_recipe(self) -> EncodeRecipe | None:
        """How `corpus` is read."""
        return (
            None
            if self.corpus is None
            else EncodeRecipe(model=self.model, texts=self.corpus, output=OutputConfig(dir="."))
        )

    def block_size(self, queries: int, world_size: int) -> int:
        """Queries of a block, so that each rank has one."""
        return min(self.mine.block_rows, max(1, -(-queries // world_size)))
