"""The recipes of exporting a model and of merging several. Loads without torch."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.values import Location

FP32_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
INFO_FILE = "embedding.json"


class ExportRecipe(Section):
    """Which model is exported, and where to."""

    model: Location
    """A folder (or hub name) in sentence-transformers' format."""
    output: Location
    """The folder to write; it must not exist."""
    int8: bool = True
    """Also model_int8.onnx: weights in 8 bits, about a quarter of the size."""


class WeightedModel(Section):
    path: Location
    """A folder in sentence-transformers' format."""
    weight: Annotated[float, Field(ge=0, le=10**6)] = 1.0
    """Relative to the weights of the other models."""


class MergeRecipe(Section):
    """Which models are merged, with which weights."""

    models: list[WeightedModel]
    """Two or more; the first gives everything that is not averaged: modules, pooling, tokenizer, configuration."""
    output: Location
    """The folder to write; it must not exist."""
    prompts: dict[str, str] | None = None
    """By role, query and document; those not named here are the first model's."""

    @model_validator(mode="after")
    def _can_be_averaged(self) -> MergeRecipe:
        if len(self.models) < 2:
            raise ValueError("models: a merge takes two or more (add one)")
        if not sum(model.weight for model in self.models):
            raise ValueError("models: every weight is 0 (give one above 0)")
        return self

    @property
    def weights(self) -> list[float]:
        """Their sum is 1."""
        total = math.fsum(model.weight for model in self.models)
        return [model.weight / total for model in self.models]
