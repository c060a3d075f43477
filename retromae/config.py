"""The recipe of a pre-training run. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lodestar.config.loader import Section
from lodestar.config.schema import AUTO, EngineConfig, ModelConfig, TrainingDataConfig, TrainingRecipe
from lodestar.config.values import Location

HEAD_LOGITS = 2**27
"""Logits that the head holds at once on a GPU; the plan counts them, the loss observes them."""


class PretrainModelConfig(ModelConfig):
    """The encoder and its tokenizer."""

    pooling: Literal["auto", "cls"] = "cls"
    """RetroMAE trains the [CLS] vector, whatever the encoder's own pooling is; auto is the same."""

    @field_validator("pooling", mode="before")
    @classmethod
    def _only_cls(cls, pooling: object) -> object:
        if pooling in ("mean", "last_token"):
            raise ValueError(
                f"{pooling}: RetroMAE trains the [CLS] vector, which its decoder reads (leave it out; fine-tuning can "
                "train any pooling)"
            )
        return "cls" if pooling == AUTO else pooling


class MaskConfig(Section):
    """How much of a text is masked."""

    encoder: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Fraction of the tokens that the encoder must predict."""
    decoder: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the tokens that are hidden from each position of the decoder."""
    decoder_sets: Annotated[int, Field(ge=0, le=10_000)] = 256
    """Masks per text; each position of the decoder picks one of them. 0: each position draws its own."""


class DecoderConfig(Section):
    """The decoder's queries."""

    query: Literal["positions", "embedding"] = "positions"
    """Query stream: position embedding + cls, or the embedding module applied to cls (with norm and dropout)."""


class LossConfig(Section):
    """Terms besides those of encoder and decoder."""

    bag_of_words: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """Weight of DupMAE's bag-of-words term; 0: off. DupMAE uses 0.1, on a term that is smaller where tokens repeat."""

    @property
    def weights(self) -> dict[str, float]:
        """Of all terms, by name, in the order of RetroMAE.forward."""
        return {"encoder": 1.0, "decoder": 1.0, "bag_of_words": self.bag_of_words}


class DataConfig(TrainingDataConfig):
    """Training texts."""

    train: Annotated[list[Location], Field(min_length=1)]
    """Files (JSONL, Parquet, text; gz too), globs, folders, folders saved by `datasets`, or hub names."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """The field of a row that holds the text."""
    long_texts: Literal["cut", "split"] = "cut"
    """Texts longer than max_length: truncate them, or split them into several examples."""


class PretrainRecipe(TrainingRecipe):
    """RetroMAE pre-training."""

    model: PretrainModelConfig
    data: DataConfig
    mask: MaskConfig = MaskConfig()
    decoder: DecoderConfig = DecoderConfig()
    loss: LossConfig = LossConfig()
    engine: EngineConfig = EngineConfig(kind="deepspeed", zero_stage=1)

    @model_validator(mode="after")
    def _a_stream_has_steps(self) -> PretrainRecipe:
        if self.data.streaming and self.schedule.steps is None:
            raise ValueError("data.streaming: a stream has no known length (set schedule.steps instead of epochs)")
        return self
