"""Encoder and tokenizer, loaded with every tensor checked by value.

Shape suffixes: N positions, B texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lodestar import rng
from lodestar.config.schema import ModelConfig, Pooling
from lodestar.errors import ModelError, first_line
from lodestar.models.folder_checks import (
    TOKENIZER_FILES,
    check_encoder,
    check_tokenizer,
    find_folder,
    read_json,
    read_prompts,
    vocabulary_problem,
)
from lodestar.models.pooling_config import causal_decoder_error
from lodestar.models.weight_files import ENCODER, FETCH, INDEX, weight_files


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, and how many of its tensors equal those of the file."""

    model: PreTrainedModel
    from_file: int
    total: int
    source: str

    def __str__(self) -> str:
        return f"{self.from_file} of {self.total} tensors from {self.source}"


def folder_prompts(name: str) -> dict[str, str]:
    """The prompts by role in a sentence-transformers folder; empty for a plain transformers folder."""
    return read_prompts(find_folder(name), ENCODER)


def load_tokenizer(model: ModelConfig, pooling: Pooling = "cls") -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, checked against its encoder; for last_token pooling it ends each text.

    It must be a fast tokenizer, because whole words are found by its word ids.
    Raises ModelError where it does not fit the encoder, or does not put the token there that the pooling reads.
    """
    field = "model.tokenizer" if model.tokenizer else "model.encoder"
    folder = find_folder(model.tokenizer or model.encoder, field, trust_remote_code=model.trust_remote_code)
    check_tokenizer(folder, None, "model.tokenizer: ")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(
            f"model.tokenizer: {folder}: cannot be opened: {first_line(error)} (save it again with a tokenizer.json)"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(f"model.tokenizer: {folder}: not a fast tokenizer (save it with a tokenizer.json)")
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # [CLS] comes first, in the exported folder too
    check_vocabulary(tokenizer, f"model.tokenizer: {folder}")
    if pooling == "cls":
        _check_cls(tokenizer, folder)
    elif pooling == "last_token":
        _add_end_token(tokenizer, folder)
    _check_fit(tokenizer, folder, model)
    return tokenizer


def _check_cls(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """ModelError unless it puts a special token before a text."""
    special_ids = set(tokenizer.all_special_ids)
    first: list[int] = tokenizer("a")["input_ids"][:1]  # type: ignore[assignment]
    if not first or first[0] not in special_ids:
        raise ModelError(
            f"model.tokenizer: {folder}: puts no [CLS] before a text, and the embedding is read there "
            "(take the encoder's own, or give its tokenizer.json a post-processor that adds one)"
        )


def _add_end_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let the tokenizer end each text, also a truncated one, with its end-of-text token where it does not yet.

    That becomes a part of tokenizer.json, so the saved folder does the same wherever it is opened.
    """
    if tokenizer.pad_token is None:  # decoders have none; which one it is does not matter, because padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    ids: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    if ids[-1] in tokenizer.all_special_ids:
        return
    if tokenizer.eos_token_id is not None:
        tokenizer.add_bos_token = ids[0] == tokenizer.bos_token_id
        tokenizer.add_eos_token = True
    if tokenizer("a")["input_ids"] != [*ids, tokenizer.eos_token_id]:
        raise ModelError(
            f"model.tokenizer: {folder}: cannot end texts with an eos_token, and the embedding is read there (set "
            "eos_token in its tokenizer_config.json, or give its tokenizer.json a post-processor that adds one)"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ModelError for a tokenizer without ordinary tokens, which transformers creates where its files are missing."""
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ModelError(f"{where}: its tokenizer knows no token but special ones (add the encoder's tokenizer files)")


def _check_fit(tokenizer: PreTrainedTokenizerBase, folder: Path, model: ModelConfig) -> None:
    """ModelError where token ids have another meaning to the encoder, as far as the encoder's folder shows."""
    config, encoder = _config(model), _encoder_folder(model)
    num_ids, num_embeddings = max(tokenizer.get_vocab().values()) + 1, getattr(config, "vocab_size", None)
    remedy = f"take the tokenizer of {encoder}"
    if problem := vocabulary_problem(num_ids, num_embeddings, sparse=model.random_weights):
        raise ModelError(f"model.tokenizer: {folder}: {problem} ({remedy})")
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None and tokenizer.pad_token_id is not None and pad_id != tokenizer.pad_token_id:
        raise ModelError(
            f"model.tokenizer: {folder}: pads with token {tokenizer.pad_token_id}, but {encoder} with {pad_id}: of "
            f"another family ({remedy})"
        )
    if folder != encoder and any((encoder / name).is_file() for name in TOKENIZER_FILES):
        encoder_vocabulary = AutoTokenizer.from_pretrained(
            encoder, trust_remote_code=model.trust_remote_code
        ).get_vocab()
        if not encoder_vocabulary.items() <= tokenizer.get_vocab().items():
            raise ModelError(
                f"model.tokenizer: {folder}: gives tokens other numbers than the encoder's tokenizer does ({remedy})"
            )


def load_encoder(
    model: ModelConfig, auto_class: Any, *, seed: int, random_head: bool = False, pooling: Pooling = "cls"
) -> LoadedEncoder:
    """An encoder in fp32, from a file or randomly initialised, as the recipe says.

    auto_class    one of transformers' Auto classes
    random_head   tensors outside the base model may be missing from the file and start randomly initialised
    pooling       that the embedding is read by
    raises        ModelError where a tensor is missing, has another shape, or differs from the file, and for a causal
                  decoder without last_token pooling
    """
    folder, config = _encoder_folder(model), _config(model)
    if model.dropout is not None:
        for name in _dropout_rates(config):
            setattr(config, name, model.dropout)
    options = _options(model, auto_class, config)
    rng.seed_everything(seed, "weights")
    if model.random_weights:
        encoder = _open(model, partial(auto_class.from_config, config, dtype=torch.float32, **options))
        total = len(list(encoder.parameters()))
        loaded = LoadedEncoder(encoder, 0, total, "nothing: randomly initialised (model.random_weights)")
    else:
        open_file = partial(auto_class.from_pretrained, folder, config=config, dtype=torch.float32, **options)
        loaded = _from_file(model, folder, partial(open_file, ignore_mismatched_sizes=True), random_head)
    _check_length(model, loaded.model)
    _check_direction(loaded.model, folder, pooling)
    if pooling == "last_token":
        loaded.model.config.use_cache = False  # of keys and values, which decoders keep to generate
    if model.activation_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    return loaded


def _encoder_folder(model: ModelConfig) -> Path:
    return find_folder(model.encoder, "model.encoder", trust_remote_code=model.trust_remote_code)


def _config(model: ModelConfig) -> PretrainedConfig:
    """The encoder's configuration; ModelError where it cannot be read."""
    folder = _encoder_folder(model)
    check_encoder(folder, model)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # each family checks its own values
        raise ModelError(
            f"model.encoder: {folder}: cannot be opened: {first_line(error)} (name a folder in transformers' format)"
        ) from None


def _open(model: ModelConfig, create: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that transformers creates; ModelError for whatever it, or code of the folder, raises."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are errors below
    try:
        return create()
    except Exception as error:  # each family fails in its own way
        raise ModelError(f"model.encoder: {model.encoder}: cannot be opened: {first_line(error)} ({FETCH})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _from_file(
    model: ModelConfig, folder: Path, create: Callable[[], PreTrainedModel], random_head: bool
) -> LoadedEncoder:
    index = read_json(folder / INDEX, dict)
    files = weight_files(folder, index, ENCODER, allow_pickle=model.allow_pickle)
    readers, encoder = _tensor_readers(files), _open(model, create)
    problems = _problems(encoder, readers)
    total = len(list(encoder.parameters()))
    base = {id(parameter) for parameter in encoder.base_model.parameters()}
    in_base = {name for name, parameter in encoder.named_parameters() if id(parameter) in base}
    fatal = [name for name in problems if not random_head or name in in_base]
    if fatal:
        remedy = "use the folder that the model was saved to"
        if in_base.isdisjoint(fatal):
            remedy = "set model.random_head: true to start with a random head"
        others = f" and {len(fatal) - 1} more" if len(fatal) > 1 else ""
        raise ModelError(
            f"model.encoder: {folder}: {total - len(problems)} of {total} tensors: {fatal[0]} "
            f"{problems[fatal[0]]}{others} ({remedy})"
        )
    return LoadedEncoder(encoder, total - len(problems), total, str(folder))


def _problems(encoder: PreTrainedModel, readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, str]:
    """What is wrong with each parameter that does not equal the file's tensor, in the order of the parameters."""
    prefix, aliases = encoder.base_model_prefix + ".", parameter_aliases(encoder)
    problems: dict[str, str] = {}
    for name, parameter in encoder.named_parameters():
        tensors = (_read_tensor(alias, prefix, readers) for alias in aliases[parameter])
        tensor = next((tensor for tensor in tensors if tensor is not None), None)
        if tensor is None:
            problems[name] = "is missing"
        elif tensor.shape != parameter.shape:
            problems[name] = f"has shape {list(tensor.shape)}, not {list(parameter.shape)}"
        elif not tensor.isfinite().all():
            problems[name] = "holds NaN or infinite values"
        elif not torch.equal(tensor.to(parameter.dtype), parameter.detach()):
            problems[name] = "was not loaded"
    return problems


def _tensor_readers(files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """By name, functions that read a tensor of the files."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if file.suffix == ".bin":
            for name, tensor in _read_pickle(file).items():
                readers[name] = lambda tensor=tensor: tensor
        else:
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                readers[name] = lambda opened=opened, name=name: opened.get_tensor(name)
    return readers


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """By torch's loader for weights, which runs no code; ModelError for what is no mapping of tensors."""
    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # a damaged pickle raises anything
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"model.encoder: {file}: is damaged, or holds more than weights ({FETCH})")
    return tensors


def parameter_aliases(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter: a tied parameter has several, in an order that depends on the family."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _read_tensor(name: str, prefix: str, readers: Mapping[str, Callable[[], Tensor]]) -> Tensor | None:
    """The tensor of that name, with or without the base model's prefix, or with a LayerNorm's old names."""
    names = [name, prefix + name, name.removeprefix(prefix)]
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        names += [candidate.replace(new, old) for candidate in names if new in candidate]
    return next((readers[candidate]() for candidate in names if candidate in readers), None)


def _options(model: ModelConfig, auto_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    """Options to build the model without a pooler, whose parameters would have no gradient: [CLS] is the embedding."""
    model_class = auto_class._model_mapping.get(type(config), None)  # the keys would import all models: two seconds
    if model.trust_remote_code and getattr(config, "auto_map", None):
        return {"trust_remote_code": True}
    if model_class is None:
        raise ModelError(
            f"model.encoder: a {config.model_type} model cannot be opened by {auto_class.__name__} (name an encoder "
            "like BERT)"
        )
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_option else {}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that determines how it splits a text; options of its last call are left out."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return json.dumps({**values, "truncation": None, "padding": None}, sort_keys=True)


def _check_length(model: ModelConfig, encoder: PreTrainedModel) -> None:
    """ModelError where the encoder has fewer positions than model.max_length."""
    rows = getattr(encoder.config, "max_position_embeddings", None)
    _, first = position_embeddings(encoder.base_model)
    if rows is not None and model.max_length > rows - first:
        raise ModelError(
            f"model.max_length: {model.max_length} tokens but {model.encoder} knows {rows - first} positions (lower it)"
        )


def _check_direction(encoder: PreTrainedModel, folder: Path, pooling: Pooling) -> None:
    """ModelError where the first token does not attend to the next ones, unless only the last token is read."""
    first, *others = [i for i in range(min(64, encoder.config.vocab_size)) if i != encoder.config.pad_token_id]
    training = encoder.training
    with torch.no_grad():
        ids_BL = torch.tensor([[first, others[0], others[1]], [first, others[2], others[3]]])
        base = encoder.eval().base_model
        try:
            cls_BD = base(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).last_hidden_state[:, 0]
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"model.encoder: {folder}: {type(encoder).__name__} is no text encoder: {first_line(error)} "
                "(name one like BERT)"
            ) from None
    encoder.train(training)
    if pooling != "last_token" and cls_BD[0].equal(cls_BD[1]):  # the texts differ behind their first token
        raise causal_decoder_error(folder, type(encoder).__name__)


def _dropout_rates(config: PretrainedConfig) -> list[str]:
    """Names of the configuration's dropout rates."""
    return [
        name
        for name, value in config.to_dict().items()
        if "dropout" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def position_embeddings(base: nn.Module) -> tuple[nn.Embedding | None, int]:
    """The table of absolute positions, none where positions are rotary, and its row for a text's first token."""
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return table, 0 if padding is None else padding + 1
