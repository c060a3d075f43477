"""The exported model of a run, as both stages write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lodestar.config.schema import Pooling, TrainingRecipe
from lodestar.models.save import model_card, save_model
from lodestar.training.task import Export


def encoder_export(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainingRecipe,
    *,
    title: str,
    prompts: Mapping[str, str],
    pooling: Pooling,
) -> Export:
    """Exports the training module's submodule `encoder` and its tokenizer; the module's other parameters are left out.

    title     of the model card
    prompts   by role: query, document
    """
    prefix = "encoder."

    def export(weights: Mapping[str, Tensor], folder: Path, results: Mapping[str, Any]) -> None:
        save_model(
            encoder,
            tokenizer,
            folder,
            weights={name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)},
            max_length=recipe.model.max_length,
            prompts=prompts,
            card=model_card(title, recipe, results, pooling),
            pooling=pooling,
        )

    return export
