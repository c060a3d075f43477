"""Backbone and tokenizer: loaded with every tensor checked by value, and saved so that others open it as it is.

The one place that knows where families of encoders keep their embeddings, positions and head.
Shape suffixes: N positions, B texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lodestar import rng
from lodestar.config.schema import ModelConfig
from lodestar.errors import ModelError, first_line

# --- loading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An encoder, and how many of its tensors are, value by value, those of the file."""

    model: PreTrainedModel
    from_file: int
    total: int
    source: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.from_file} of {self.total} tensors from {self.source}", *self.warnings])


def find_folder(name: str) -> Path:
    """`name` as a folder: itself, or the local copy of a hub repository of that name."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise ModelError(
            f"model.encoder: {name}: neither a folder nor a model that the hub or its cache holds"
        ) from None


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, checked against its encoder.

    It must be a fast one, because whole words are found by its word ids.
    Raises ModelError where it does not fit the encoder, or puts no [CLS] before a text.
    """
    folder = find_folder(model.tokenizer or model.encoder)
    if not any(path.name in TOKENIZER_FILES or path.suffix == ".model" for path in folder.iterdir()):
        # transformers would make up a tokenizer that knows five tokens
        raise ModelError(f"model.tokenizer: {folder}: has no tokenizer files (name a folder that has, or add them)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(
            f"model.tokenizer: {folder}: cannot be opened: {first_line(error)} (save it again with a tokenizer.json)"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(f"model.tokenizer: {folder}: not a fast tokenizer (save it with a tokenizer.json)")
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # [CLS] comes first, in the exported folder too
    _check_ids(tokenizer, folder)
    _check_fit(tokenizer, folder, model)
    return tokenizer


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.tiktoken", "tekken.json")


def _check_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """It knows more than special tokens, and puts one of those before a text."""
    check_vocabulary(tokenizer, f"model.tokenizer: {folder}")
    special = set(tokenizer.all_special_ids)
    first: list[int] = tokenizer("a")["input_ids"][:1]  # type: ignore[assignment]
    if not first or first[0] not in special:
        raise ModelError(
            f"model.tokenizer: {folder}: puts no [CLS] before a text, and the embedding is read there "
            "(take the encoder's own, or give its tokenizer.json a post-processor that adds one)"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ModelError for one that transformers made up where its files are missing: every text is the same to it."""
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ModelError(f"{where}: its tokenizer knows no token but special ones (add the encoder's tokenizer files)")


def _check_fit(tokenizer: PreTrainedTokenizerBase, folder: Path, model: ModelConfig) -> None:
    """Its ids mean what they meant to the encoder, as far as the encoder's folder tells."""
    config, encoder = _config(model), find_folder(model.encoder)
    ids, known = max(tokenizer.get_vocab().values()) + 1, getattr(config, "vocab_size", None)
    remedy = f"take the tokenizer of {encoder}"
    if known is not None and ids > known:
        raise ModelError(
            f"model.tokenizer: {folder}: has {ids:,} tokens, but {encoder} embeds {known:,} of them ({remedy}, or "
            "enlarge its embeddings)"
        )
    if known is not None and not model.random_weights and ids < SPARSE_VOCABULARY * known:
        raise ModelError(
            f"model.tokenizer: {folder}: has {ids:,} tokens, but {encoder} embeds {known:,}: another vocabulary "
            f"({remedy})"
        )
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and tokenizer.pad_token_id is not None and pad != tokenizer.pad_token_id:
        raise ModelError(
            f"model.tokenizer: {folder}: pads with token {tokenizer.pad_token_id}, but {encoder} with {pad}: of "
            f"another family ({remedy})"
        )
    if folder != encoder and any((encoder / name).is_file() for name in TOKENIZER_FILES):
        own = AutoTokenizer.from_pretrained(encoder).get_vocab()
        if not own.items() <= tokenizer.get_vocab().items():
            raise ModelError(
                f"model.tokenizer: {folder}: gives tokens other numbers than the encoder's own does ({remedy})"
            )


SPARSE_VOCABULARY = 0.9
"""Embeddings are often padded to a multiple; a tokenizer that fills less of them than this is not theirs."""


def load_encoder(model: ModelConfig, auto_class: Any, *, seed: int, random_head: bool = False) -> Loaded:
    """An encoder in fp32 by one of transformers' Auto classes, from a file or randomly initialised, as the recipe says.

    random_head   the tensors outside the base model may be missing from the file and start randomly initialised
    Raises ModelError where a tensor is missing, has another shape, or is not what the file holds.
    """
    folder, config = find_folder(model.encoder), _config(model)
    if model.dropout is not None:
        for name in _dropout_rates(config):
            setattr(config, name, model.dropout)
    extra = _without_pooler(auto_class, config)
    rng.seed_everything(seed, "weights")
    if model.random_weights:
        encoder = auto_class.from_config(config, dtype=torch.float32, **extra)
        loaded = Loaded(
            encoder, 0, len(list(encoder.parameters())), "nothing: randomly initialised (model.random_weights)"
        )
    else:
        loaded = _from_file(folder, config, auto_class, extra, random_head)
    _check_length(model, loaded.model)
    _check_direction(loaded.model, folder)
    if model.activation_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    return replace(loaded, warnings=_pooling_warning(folder))


def _config(model: ModelConfig) -> Any:
    """The encoder's configuration; ModelError where it cannot be read."""
    folder = find_folder(model.encoder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.encoder: {folder}: cannot be opened: {first_line(error)} (name a folder in transformers' format)"
        ) from None


def _from_file(folder: Path, config: Any, auto_class: Any, extra: dict[str, Any], random_head: bool) -> Loaded:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(
            f"model.encoder: {folder}: has no weights (set model.random_weights: true to start randomly initialised)"
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        encoder = auto_class.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **extra
        )
        held = _tensors(files)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.encoder: {folder}: cannot be opened: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    prefix = encoder.base_model_prefix + "."
    wrong: dict[str, str] = {}
    total = 0
    aliases = _aliases(encoder)
    for name, parameter in encoder.named_parameters():
        total += 1
        found = next((t for alias in aliases[parameter] if (t := _in_file(alias, prefix, held)) is not None), None)
        if found is None:
            wrong[name] = "is missing"
        elif found.shape != parameter.shape:
            wrong[name] = f"has shape {list(found.shape)}, not {list(parameter.shape)}"
        elif not torch.equal(found.to(parameter.dtype), parameter.detach()):
            wrong[name] = "was not loaded"
    base = {id(parameter) for parameter in encoder.base_model.parameters()}
    fatal = [
        name
        for name, parameter in encoder.named_parameters()
        if name in wrong and not (random_head and id(parameter) not in base)
    ]
    if fatal:
        head_only = all(id(p) not in base for n, p in encoder.named_parameters() if n in fatal)
        remedy = (
            "set model.random_head: true to start with a random head"
            if head_only
            else "use the folder that the model was saved to"
        )
        more = f" and {len(fatal) - 1} more" if len(fatal) > 1 else ""
        raise ModelError(
            f"model.encoder: {folder}: {total - len(wrong)} of {total} tensors: {fatal[0]} "
            f"{wrong[fatal[0]]}{more} ({remedy})"
        )
    return Loaded(encoder, total - len(wrong), total, str(folder))


def _tensors(files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """Readers for the tensors of the files, by name; a tensor is read when it is called for."""
    held: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if file.suffix == ".bin":
            for name, tensor in torch.load(file, weights_only=True, map_location="cpu", mmap=True).items():
                held[name] = lambda tensor=tensor: tensor
        else:
            reader = safe_open(file, framework="pt")
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                held[name] = lambda reader=reader, name=name: reader.get_tensor(name)
    return held


def _aliases(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter: tied ones have several, and which is the first depends on the family."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _in_file(name: str, prefix: str, held: Mapping[str, Callable[[], Tensor]]) -> Tensor | None:
    """The file's tensor of that name, with or without the base model's prefix, or under a norm's old names."""
    names = [name, prefix + name, name.removeprefix(prefix)]
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        names += [candidate.replace(new, old) for candidate in names if new in candidate]
    return next((held[candidate]() for candidate in names if candidate in held), None)


def _without_pooler(auto_class: Any, config: Any) -> dict[str, Any]:
    """[CLS] itself is the embedding; a pooler would only be a tensor without a gradient."""
    if type(config) not in auto_class._model_mapping.keys():  # noqa: SIM118 (not a dict)
        raise ModelError(
            f"model.encoder: a {config.model_type} model cannot be opened by {auto_class.__name__} (name an encoder "
            "like BERT)"
        )
    model_class = auto_class._model_mapping[type(config)]
    known = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if known else {}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides how it splits a text, but not what its last call asked for."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return json.dumps({**made, "truncation": None, "padding": None}, sort_keys=True)


def _check_length(model: ModelConfig, encoder: PreTrainedModel) -> None:
    rows = getattr(encoder.config, "max_position_embeddings", None)
    _, first = position_embeddings(encoder.base_model)
    if rows is not None and model.max_length > rows - first:
        raise ModelError(
            f"model.max_length: {model.max_length} tokens but {model.encoder} knows {rows - first} positions (lower it)"
        )


def _check_direction(encoder: PreTrainedModel, folder: Path) -> None:
    """The first token sees those behind it: in a causal decoder texts that begin alike would have equal vectors."""
    first, *others = [i for i in range(min(64, encoder.config.vocab_size)) if i != encoder.config.pad_token_id]
    training = encoder.training
    with torch.no_grad():
        ids_BL = torch.tensor([[first, others[0], others[1]], [first, others[2], others[3]]])
        base = encoder.eval().base_model
        try:
            seen_BD = base(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).last_hidden_state[:, 0]
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"model.encoder: {folder}: {type(encoder).__name__} is no text encoder: {first_line(error)} "
                "(name one like BERT)"
            ) from None
    encoder.train(training)
    if seen_BD[0].equal(seen_BD[1]):
        raise ModelError(
            f"model.encoder: {folder}: {type(encoder).__name__} is a causal decoder: its first token, whose vector is "
            "the embedding, sees no other (name an encoder like BERT)"
        )


def _pooling_warning(folder: Path) -> tuple[str, ...]:
    """A line where the folder's own embedding is not the [CLS] vector."""
    file = folder / "1_Pooling" / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        raise ModelError(f"model.encoder: {file}: not valid JSON (fetch the folder again)") from None
    modes = values.get("pooling_mode") or []
    modes = [modes] if isinstance(modes, str) else list(modes)
    before = "pooling_mode_"  # of older versions: a switch for each
    modes += [name.removeprefix(before) for name in values if name.startswith(before) and values[name]]
    if not modes or modes in (["cls"], ["cls_token"]):
        return ()
    return (
        f"warning: model.encoder: {folder}: its embedding is by {' and '.join(modes)} pooling; it is trained and saved "
        "with [CLS] pooling",
    )


def _dropout_rates(config: Any) -> list[str]:
    return [
        n
        for n, v in config.to_dict().items()
        if "dropout" in n and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]


# --- parts -----------------------------------------------------------------------------------


def position_embeddings(base: nn.Module) -> tuple[nn.Embedding | None, int]:
    """The table of absolute positions, none where positions are rotary, and its row for a text's first token."""
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return table, 0 if padding is None else padding + 1
