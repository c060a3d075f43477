"""What an encoder's config.json says of its size, and what in a recipe cannot fit it. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lodestar.config.schema import ModelConfig
from lodestar.errors import ConfigError, ModelError, shown
from lodestar.models.folder_checks import read_json
from lodestar.models.pooling_config import encoder_file
from lodestar.models.weight_files import ENCODER
from lodestar.planning.cost_model import BERT_BASE, EncoderShape
from lodestar.planning.plan import PlanWarnings

_POSITIONS_AFTER_PADDING = (
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
"""Values of model_type whose first token stands at position pad_token_id + 1."""


def encoder_shape(model: ModelConfig, warnings: PlanWarnings) -> EncoderShape:
    """The shape in the encoder's folder or in the hub's cache on this machine; with a warning BERT-base's."""
    return warnings.or_default(BERT_BASE, lambda: _shape_in(model), "memory is estimated for BERT-base")


def check_encoder(model: ModelConfig, *, lengths: Mapping[str, int | None], widths: Sequence[int] = ()) -> None:
    """ConfigError for texts longer than the encoder's positions, or Matryoshka widths that are not narrower than it.

    lengths   in tokens, by the key of the recipe
    Says nothing where there is no config.json on this machine.
    """
    path = encoder_file(model.encoder, "config.json")
    if path is None:
        return
    config = read_json(path, dict, ENCODER) or {}
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        is_after_padding = config.get("model_type") in _POSITIONS_AFTER_PADDING
        positions -= 1 + _size(path, config, "pad_token_id", 1) if is_after_padding else 0
        for field, length in lengths.items():
            if length is not None and length > positions:
                raise ConfigError(
                    f"{field}: {length} tokens but {model.encoder} knows {positions} positions (lower it)"
                )
    for width in widths:
        if width >= (full_width := _size(path, config, "hidden_size")):
            raise ConfigError(
                f"loss.matryoshka: {width}: not narrower than the embedding, which has {full_width} (lower it)"
            )


def _shape_in(model: ModelConfig) -> EncoderShape:
    path = encoder_file(model.encoder, "config.json")
    if path is None:
        raise ConfigError(
            f"model.encoder: {model.encoder}: no config.json there or in the hub's cache (check the name)"
        )
    config = read_json(path, dict, ENCODER) or {}
    width = _size(path, config, "hidden_size")
    return EncoderShape(
        layers=_size(path, config, "num_hidden_layers"),
        width=width,
        feed_forward=_size(path, config, "intermediate_size", 4 * width),
        vocabulary=_size(path, config, "vocab_size"),
        positions=_size(path, config, "max_position_embeddings", 0),
    )


def _size(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if value is None and default is None:
        raise ModelError(f"model.encoder: {path}: {key}: not set (an encoder in transformers' format has it)")
    if value is None or value == default:
        return cast(int, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10**9:
        problem = f"must be a whole number from 1 to 10^9, got {shown(value)}"
        raise ModelError(f"model.encoder: {path}: {key}: {problem} (fetch the folder again)")
    return value
