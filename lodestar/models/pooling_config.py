"""Which pooling a run trains, by its recipe and the encoder's small files alone. Loads without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lodestar.config.schema import AUTO, ModelConfig, Pooling
from lodestar.errors import ModelError
from lodestar.models.folder_checks import LEGACY_KEYS, read_json
from lodestar.models.weight_files import ENCODER

POOLING_FILE = Path("1_Pooling") / "config.json"
POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}
"""sentence-transformers' names -> ours."""
CAUSAL_DECODERS = frozenset({
    "bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "modernbert-decoder", "mpt", "olmo", "olmo2",
    "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Common values of model_type; loading an encoder finds the others by what its first token sees."""


class PoolingChoice(NamedTuple):
    pooling: Pooling
    reason: str
    warnings: tuple[str, ...] = ()
    """One line each."""


def resolve_pooling(model: ModelConfig, folder: Path) -> PoolingChoice:
    """The recipe's pooling; for `auto` that of the encoder's folder, and [CLS] where it names none.

    folder    of the encoder
    Raises ModelError for a pooling that cannot be trained, and for a causal decoder without last_token pooling.
    """
    own, warnings = folder_pooling(folder), ()
    if model.pooling == AUTO:
        if own is not None and own not in POOLINGS:
            raise ModelError(
                f"model.pooling: {folder / POOLING_FILE}: {own} pooling cannot be trained (set model.pooling to cls, "
                "mean or last_token)"
            )
        pooling = POOLINGS[own or "cls"]
        reason = f"{folder} names none" if own is None else f"as {folder} embeds"
    else:
        pooling, reason = model.pooling, "as the recipe says"
        if own is not None and POOLINGS.get(own) != pooling:
            warnings = (
                f"warning: model.pooling: {folder} embeds by {POOLINGS.get(own, own)} pooling; this run trains and "
                f"saves {pooling} pooling",
            )
    kind = read_json(folder / "config.json", dict, ENCODER) or {}
    if pooling != "last_token" and _is_causal(kind):
        raise causal_decoder_error(folder, kind.get("model_type"))
    return PoolingChoice(pooling, reason, warnings)


def pooling_on_disk(model: ModelConfig) -> PoolingChoice | None:
    """As `resolve_pooling`, without a network; none for a hub name whose cached files do not say it."""
    if Path(model.encoder).is_dir():
        return resolve_pooling(model, Path(model.encoder))
    config, modules = (encoder_file(model.encoder, name) for name in ("config.json", "modules.json"))
    # Without modules.json the cache may hold a part of the repository, as other libraries fetch it.
    if config is None or (modules is None and model.pooling == AUTO):
        return None
    return resolve_pooling(model, config.parent)


def encoder_file(encoder: str, name: str) -> Path | None:
    """A file of the encoder's folder, or of the hub's cache on this machine; none where it is not there."""
    path = Path(encoder) / name
    if path.is_file():
        return path
    cached = None
    if not Path(encoder).exists():
        with suppress(HFValidationError):  # a path, not a name
            cached = try_to_load_from_cache(encoder, name)
    return Path(cached) if isinstance(cached, str) else None


def folder_pooling(folder: Path) -> str | None:
    """sentence-transformers' name of a folder's pooling, with what it adds to it; none where it says nothing."""
    if not (folder / POOLING_FILE).is_file():
        return None
    values = read_json(folder / POOLING_FILE, dict, ENCODER) or {}
    modes = values.get("pooling_mode") or [mode for mode, key in LEGACY_KEYS.items() if values.get(key)] or "mean"
    name = modes if isinstance(modes, str) else " and ".join(modes)
    return name if values.get("include_prompt", True) else f"{name} (without the prompt)"


def causal_decoder_error(folder: Path, kind: object) -> ModelError:
    """For an encoder whose tokens see only those before them, where the pooling is not last_token."""
    return ModelError(
        f"model.encoder: {folder}: {kind} is a causal decoder: its first token sees no other (name an encoder like "
        "BERT, or fine-tune it with model.pooling: last_token)"
    )


def _is_causal(config: dict[str, Any]) -> bool:
    """Whether config.json says so; where it asks for bidirectional attention, loading finds out."""
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        return False
    return config.get("is_decoder") is True or config.get("model_type") in CAUSAL_DECODERS
