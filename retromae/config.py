"""The recipe of a pre-training run. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import EngineConfig, Natural, TrainingDataConfig, TrainingRecipe

HEAD_LOGITS = 2**27
"""Logits that the head holds at once on a GPU; the plan counts them, the loss keeps to them."""


class MaskConfig(Section):
    encoder: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Fraction of the tokens that the encoder does not see and must name."""
    decoder: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the tokens that each position of the decoder does not see."""
    decoder_sets: Natural = 256
    """Masks drawn for each text, of which every position picks one; 0: every position draws its own."""


class DecoderConfig(Section):
    query: Literal["positions", "embedding"] = "positions"
    """Query stream: position embedding + cls, or the embedding module applied to cls (with norm and dropout)."""


class LossConfig(Section):
    bag_of_words: Annotated[float, Field(ge=0)] = 0.0
    """Weight of DupMAE's bag-of-words term; 0: off, DupMAE itself takes 0.1."""


class DataConfig(TrainingDataConfig):
    train: Annotated[list[str], Field(min_length=1)]
    """Files (JSONL, Parquet, text; gz too), globs, folders, folders saved by `datasets`, or hub names."""
    field: str = "text"
    """Which field of a row is the text."""
    long_texts: Literal["cut", "split"] = "cut"
    """Texts over max_length: cut off the rest, or make it further rows."""
    streaming: bool = False
    """Read while training, without a cache; needs schedule.steps. Rows are shuffled within windows."""


class PretrainRecipe(TrainingRecipe):
    """RetroMAE pre-training."""

    data: DataConfig
    mask: MaskConfig = MaskConfig()
    decoder: DecoderConfig = DecoderConfig()
    loss: LossConfig = LossConfig()
    engine: EngineConfig = EngineConfig(kind="deepspeed", zero_stage=1)
