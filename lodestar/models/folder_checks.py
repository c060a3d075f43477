"""A model folder, read before any library opens it: whatever is damaged or foreign is told in one line.

Every command that opens a model begins here. Loads without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from lodestar.config.schema import ModelConfig
from lodestar.errors import ModelError, did_you_mean, names, shown
from lodestar.files import NO_SUCH_FILE, Json, file_problem, json_value
from lodestar.models.config_checks import (
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Size,
    config_problems,
    is_known_model_type,
    known_model_types,
)
from lodestar.models.weight_files import (
    ENCODER,
    FETCH,
    INDEX,
    PICKLES,
    SAFETENSORS,
    TensorHeader,
    check_finite,
    read_headers,
    weight_files,
)

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.tiktoken", "tekken.json")
SPARSE_VOCABULARY = 0.9
"""Embeddings are often padded to a multiple; a tokenizer with a smaller fraction of their number does not fit."""
LEGACY_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""sentence-transformers' names of poolings -> their switches in folders written before its version 5.4."""
_MAX_JSON_BYTES = 1 << 29
_OPENED = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*/*.json", "*/*.safetensors", "*/*.bin")
"""What libraries may open in a folder."""


# --- where a model is ------------------------------------------------------------------------


def local_folder(name: str | Path, field: str = "", remedy: str = "check the path") -> Path | None:
    """The folder on this disk; none for what may be a name of the hub; ModelError for a path without a folder.

    field    of the recipe that names it
    remedy   where there is none
    """
    path, text = Path(name), str(name)
    is_name = bool(text.strip()) and text.isprintable()
    if is_name and path.is_dir():
        return path
    if is_name and os.path.lexists(path):
        problem = (file_problem(path) or "is a file, not a folder").replace("not a file", "not a folder")
        raise ModelError(f"{_prefix(field)}{text}: {problem} (name the folder of a model)")
    if not is_name or text.startswith((".", "/", "~")) or text.count("/") > 1:  # names of the hub have one /
        raise ModelError(f"{_prefix(field)}{text if is_name else shown(text)}: no such folder ({remedy})")
    return None


def find_folder(name: str | Path, field: str = "model.encoder", *, trust_remote_code: bool = False) -> Path:
    """`name` as a folder: itself, or the local copy of that repository of the hub; ModelError where there is none."""
    if (folder := local_folder(name, field)) is not None:
        return folder
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", PICKLES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        problem = "neither a folder nor a model of the hub or its cache"
        raise ModelError(f"{_prefix(field)}{name}: {problem} (check the name; offline, name a folder)") from None


def _prefix(field: str) -> str:
    return f"{field}: " if field else ""


# --- the folder of an encoder ----------------------------------------------------------------


def check_model(model: ModelConfig, *, finite: bool = False) -> None:
    """ModelError for what is wrong with the folders of a training recipe; names of the hub pass until they are here.

    finite   also read all weights, for NaN
    """
    encoder = local_folder(model.encoder, "model.encoder")
    tokenizer = encoder if model.tokenizer is None else local_folder(model.tokenizer, "model.tokenizer")
    config: dict[str, Any] = {} if encoder is None else check_encoder(encoder, model, finite=finite)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.get("vocab_size"), "model.tokenizer: ", sparse=model.random_weights)


def check_encoder(folder: Path, model: ModelConfig, *, finite: bool = False) -> dict[str, Any]:
    """The configuration in the folder of a recipe's encoder; ModelError for what is wrong with its files."""
    config = read_config(folder, ENCODER, trust_remote_code=model.trust_remote_code)
    if not model.random_weights:
        headers = _check_weights(folder, config, ENCODER, allow_pickle=model.allow_pickle)
        if finite:
            check_finite(headers, ENCODER)
    _check_sentence_transformers_files(folder, config, ENCODER)
    return config


def check_embedding_model(folder: Path, *, finite: bool = False) -> None:
    """ModelError for what is wrong with a sentence-transformers folder; pickle and code in it are refused.

    finite   also read all weights, for NaN
    """
    modules = read_json(folder / "modules.json", list)
    assert modules is not None, "the caller looks for it"
    subfolders = _check_modules(folder, modules)
    for path in sorted(set(subfolders.values()) - {folder}):
        _check_module(path)
    config: dict[str, Any] = {}
    for path in (path for kind, path in subfolders.items() if kind.endswith("Transformer")):
        config = check_plain_model(path, finite=finite)
    _check_sentence_transformers_files(folder, config, "")


def check_plain_model(folder: Path, prefix: str = "", *, finite: bool = False) -> dict[str, Any]:
    """The configuration of a transformers folder; ModelError for what is wrong with it, also pickle and code.

    finite   also read all weights, for NaN
    """
    config = read_config(folder, prefix, trust_remote_code=False)
    headers = _check_weights(folder, config, prefix, allow_pickle=False)
    check_tokenizer(folder, config.get("vocab_size"), prefix)
    if finite:
        check_finite(headers, prefix)
    return config


def embedding_width(folder: Path) -> int | None:
    """Of a sentence-transformers folder, by its small files; none where they do not say it."""
    modules = _check_modules(folder, read_json(folder / "modules.json", list) or [])
    widths = [WIDTH.of(read_json(path / "config.json", dict) or {})[1] for path in modules.values()]
    dense = [(read_json(path / "config.json", dict) or {}).get("out_features") for path in modules.values()]
    return next((width for width in (*dense[::-1], *widths) if type(width) is int), None)


def read_config(folder: Path, prefix: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """config.json; ModelError where its values cannot be those of a model, or where it brings code."""
    path = folder / "config.json"
    config = read_json(path, dict, prefix)
    if config is None:
        raise ModelError(f"{prefix}{folder}: no config.json there (name a folder in transformers' format)")
    for file in sorted(file for pattern in _OPENED for file in folder.glob(pattern)):
        if (problem := file_problem(file)) and not file.is_dir():
            raise ModelError(f"{prefix}{file}: {problem} ({FETCH})")
    own_code = config.get("auto_map") or (read_json(folder / "tokenizer_config.json", dict, prefix) or {}).get(
        "auto_map"
    )
    if own_code and not trust_remote_code:
        allow = "set model.trust_remote_code: true to run it, or " if prefix == ENCODER else ""
        problem = "the folder brings its own code, which is not run"
        raise ModelError(f"{prefix}{path}: auto_map: {problem} ({allow}take a model that transformers knows)")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{prefix}{path}: model_type: must be text, as bert, got {shown(kind)} ({FETCH})")
    if not own_code and not is_known_model_type(kind):
        hint = did_you_mean(kind, known_model_types(), "update transformers, or take a model that it knows")
        raise ModelError(f"{prefix}{path}: model_type: {names([kind])}: transformers knows no such model ({hint})")
    for problem in config_problems(config):
        raise ModelError(f"{prefix}{path}: {problem} ({FETCH})")
    return config


# --- weights ---------------------------------------------------------------------------------

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block)\.(\d+)\.")
_TABLES = (
    (re.compile(r"(?:^|\.)(?:word_embeddings|tok_embeddings|embed_tokens|wte)\.weight$"), 0, VOCABULARY),
    (re.compile(r"(?:^|\.)(?:position_embeddings|wpe)\.weight$"), 0, POSITIONS),
    (re.compile(r"(?:^|\.)(?:position_embeddings|wpe)\.weight$"), 1, WIDTH),
    (re.compile(r"(?:^|\.)token_type_embeddings\.weight$"), 0, Size(("type_vocab_size",), 0)),
    (re.compile(r"(?:^|\.)intermediate\.dense\.weight$"), 0, Size(("intermediate_size",), 0)),
)
"""Tensors, and which of their sizes config.json states."""


def _check_weights(
    folder: Path, config: Mapping[str, Any], prefix: str, *, allow_pickle: bool
) -> dict[str, TensorHeader]:
    """The headers of the folder's weights, of which config.json must be true; none of pickle."""
    index = read_json(folder / INDEX, dict, prefix)
    files = weight_files(folder, index, prefix, allow_pickle=allow_pickle)
    headers: dict[str, TensorHeader] = {}
    for file in files:
        if file.suffix == ".safetensors":
            headers |= read_headers(file, prefix)
    path = folder / "config.json"
    for name, header in headers.items():
        for pattern, axis, size in _TABLES:
            key, value = size.of(config)
            if key and pattern.search(name) and len(header.shape) > axis and header.shape[axis] != value:
                problem = f"is {value:,}, but {name} of its weights has shape {header.shape}"
                raise ModelError(f"{prefix}{path}: {key}: {problem} (take the config.json of these weights)")
    numbers = [int(match[1]) for match in map(_LAYER.search, headers) if match]
    key, layers = LAYERS.of(config)
    if key and numbers and max(numbers) + 1 < layers:
        problem = f"is {layers:,}, but its weights hold {max(numbers) + 1:,} layers"
        raise ModelError(f"{prefix}{path}: {key}: {problem} (take the config.json of these weights)")
    return headers


# --- the tokenizer ---------------------------------------------------------------------------


def check_tokenizer(folder: Path, num_embeddings: int | None, prefix: str, *, sparse: bool = False) -> None:
    """ModelError for a folder without a tokenizer, or with a damaged one, or with one of another vocabulary.

    num_embeddings   of the encoder
    sparse           whether the encoder may have many more embeddings
    """
    if not any(path.name in TOKENIZER_FILES or path.suffix == ".model" for path in folder.iterdir()):
        # transformers would create a tokenizer with five tokens
        raise ModelError(f"{prefix}{folder}: has no tokenizer files (name a folder that has, or add them)")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        read_json(folder / name, dict, prefix)
    path = folder / "tokenizer.json"
    if file_problem(path) == NO_SUCH_FILE:
        return
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab().values()
    except Exception:  # the library raises Exception itself
        read_json(path, dict, prefix)
        raise ModelError(f"{prefix}{path}: is no tokenizer that tokenizers can read ({FETCH})") from None
    if problem := vocabulary_problem(max(ids, default=-1) + 1, num_embeddings, sparse=sparse):
        raise ModelError(f"{prefix}{path}: {problem} (take the encoder's own tokenizer)")


def vocabulary_problem(num_ids: int, num_embeddings: int | None, *, sparse: bool = False) -> str | None:
    """Why a tokenizer does not fit an encoder, by their sizes; none where it does."""
    if num_embeddings is None or SPARSE_VOCABULARY * num_embeddings <= num_ids <= num_embeddings:
        return None
    if num_ids > num_embeddings:
        return f"has {num_ids:,} tokens, but the encoder embeds {num_embeddings:,} of them"
    return None if sparse else f"has {num_ids:,} tokens, but the encoder embeds {num_embeddings:,}: another vocabulary"


# --- sentence-transformers' files ------------------------------------------------------------


def _check_modules(folder: Path, modules: list[Any]) -> dict[str, Path]:
    """The folders of the modules, by their types."""
    path, subfolders = folder / "modules.json", dict[str, Path]()
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise ModelError(f"{path}: each module must have a type and a path, got {shown(module)} ({FETCH})")
        kind, place = module["type"], module["path"]
        if not re.fullmatch(r"sentence_transformers(\.\w+)+", kind):
            problem = "code that sentence-transformers does not bring, which is not run"
            raise ModelError(f"{path}: type: {names([kind])}: {problem} (take a model with plain modules)")
        if not (folder / place).is_dir() or ".." in Path(place).parts or Path(place).is_absolute():
            if kind.rpartition(".")[2] == "Normalize" and ".." not in place:
                continue  # it has no files, and tools that copy files leave its folder out
            raise ModelError(f"{path}: path: {names([place])}: no such folder in {folder} ({FETCH})")
        subfolders[kind] = folder / place
    if not modules:
        raise ModelError(f"{path}: names no module ({FETCH})")
    return subfolders


def _check_module(folder: Path) -> None:
    read_json(folder / "config.json", dict)
    if (folder / SAFETENSORS).is_file():
        read_headers(folder / SAFETENSORS)
    elif any(folder.glob(PICKLES)):
        weight_files(folder, None, "", allow_pickle=False)


def _check_sentence_transformers_files(folder: Path, config: Mapping[str, Any], prefix: str) -> None:
    """What an embedding model has beside its encoder, as far as it is there."""
    read_json(folder / "modules.json", list, prefix)
    settings = read_json(folder / "sentence_bert_config.json", dict, prefix) or {}
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        path = folder / "sentence_bert_config.json"
        raise ModelError(
            f"{prefix}{path}: max_seq_length: must be a whole number above 0, got {shown(length)} ({FETCH})"
        )
    read_prompts(folder, prefix)
    path = folder / "1_Pooling" / "config.json"
    pooling = read_json(path, dict, prefix) or {}
    modes = pooling.get("pooling_mode", "mean")
    for mode in modes if isinstance(modes, list) and modes else [modes]:
        if mode not in LEGACY_KEYS:
            known = ", ".join(LEGACY_KEYS)
            raise ModelError(f"{prefix}{path}: pooling_mode: must be one of {known}, got {shown(mode)} ({FETCH})")
    width = WIDTH.of(config)[1]
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if key in pooling and width is not None and pooling[key] != width:
            raise ModelError(
                f"{prefix}{path}: {key}: is {shown(pooling[key])}, but the encoder's width {width} ({FETCH})"
            )


def read_prompts(folder: Path, prefix: str = "") -> dict[str, str]:
    """The prompts by role in a sentence-transformers folder; empty for a plain transformers folder."""
    path = folder / "config_sentence_transformers.json"
    settings = read_json(path, dict, prefix) or {}
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise ModelError(f"{prefix}{path}: prompts: must be texts by role, got {shown(prompts)} ({FETCH})")
    if (default := settings.get("default_prompt_name")) is not None and default not in prompts:
        raise ModelError(f"{prefix}{path}: default_prompt_name: {shown(default)}: no such prompt (add it to prompts)")
    return {role: prompt or "" for role, prompt in prompts.items()}


def read_json(path: Path, kind: type[Json], prefix: str = "") -> Json | None:
    """A JSON object or list; none where the file is absent, ModelError where it is anything else."""
    if file_problem(path) == NO_SUCH_FILE:
        return None
    try:
        return json_value(path, kind, _MAX_JSON_BYTES)
    except ValueError as error:
        raise ModelError(f"{prefix}{path}: {error} ({FETCH})") from None
