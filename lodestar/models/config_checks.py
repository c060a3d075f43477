"""The values of an encoder's config.json: which no model can have. Loads without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lodestar.errors import names, shown


def is_known_model_type(kind: str) -> bool:
    """Whether transformers has such a model; the folder of that name is looked at before all others."""
    folder = kind.replace("-", "_")
    return (folder.isidentifier() and kind in known_model_types(folder)) or kind in known_model_types()


@cache
def known_model_types(folder: str = "*") -> frozenset[str]:
    """transformers' values of model_type, read from its files: importing it would load torch.

    folder   of its models; all by default
    """
    spec = find_spec("transformers")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    files = (file for root in roots for file in Path(root, "models").glob(f"{folder}/configuration_*.py"))
    pattern = re.compile(r'^    model_type(?:: \w+)? = "([^"]+)"', re.MULTILINE)
    return frozenset(kind for file in files for kind in pattern.findall(file.read_text(encoding="utf-8")))


class Size(NamedTuple):
    """A number of config.json, under the names that families give it."""

    keys: tuple[str, ...]
    most: int
    """More than any model has: what is larger would take all memory."""
    least: int = 1

    def of(self, config: Mapping[str, Any]) -> tuple[str, Any]:
        """(key, value) in a configuration; none where it has no such number."""
        return next(((key, config[key]) for key in self.keys if config.get(key) is not None), ("", None))


WIDTH = Size(("hidden_size", "d_model", "n_embd", "dim"), 1 << 17)
LAYERS = Size(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1 << 12)
HEADS = Size(("num_attention_heads", "n_head", "n_heads", "num_heads"), 1 << 12)
KEY_HEADS = Size(("num_key_value_heads",), 1 << 12)
VOCABULARY = Size(("vocab_size",), 1 << 25)
POSITIONS = Size(("max_position_embeddings", "n_positions"), 1 << 25)
_SIZES = (
    WIDTH, LAYERS, HEADS, KEY_HEADS, VOCABULARY, POSITIONS,
    Size(("intermediate_size",), 1 << 21), Size(("d_ff",), 1 << 21), Size(("n_inner",), 1 << 21),
    Size(("head_dim",), 1 << 14), Size(("embedding_size",), 1 << 17), Size(("type_vocab_size",), 1 << 12, least=0),
)  # fmt: skip


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a config.json, in the words of a message without its remedy."""
    problems: list[str] = []
    for size in _SIZES:
        key, value = size.of(config)
        if key and (type(value) is not int or not size.least <= value <= size.most):
            expected = f"must be a whole number from {size.least} to {size.most:,}"
            problems.append(f"{key}: {expected}, got {shown(value)}")
    for key, value in config.items():
        problem = None
        if "dropout" in key and not isinstance(value, bool | None) and not _is_number(value, 0, 1):
            problem = "must be a number from 0 to below 1"
        elif key.endswith(("_eps", "_epsilon")) and not (_is_number(value, 0, 1) and value):
            problem = "must be a number between 0 and 1"
        elif key == "initializer_range" and not _is_number(value, 0, 100):
            problem = "must be a number from 0"
        elif key in ("bos_token_id", "pad_token_id") and value is not None and type(value) is not int:
            problem = "must be a whole number"
        if problem:
            problems.append(f"{names([key])}: {problem}, got {shown(value)}")
    if problems:
        return problems
    (_, width), (heads_key, heads), (_, key_heads) = (size.of(config) for size in (WIDTH, HEADS, KEY_HEADS))
    if width and heads and width % heads and not config.get("head_dim"):
        problems.append(f"{heads_key}: {heads} heads do not divide a width of {width}")
    if heads and key_heads and heads % key_heads:
        problems.append(f"num_key_value_heads: {key_heads} do not divide {heads} heads")
    pad_id, num_embeddings = config.get("pad_token_id"), config.get("vocab_size")
    if pad_id is not None and num_embeddings is not None and pad_id >= num_embeddings:
        problems.append(f"pad_token_id: {pad_id}: the vocabulary has {num_embeddings:,} tokens")
    return problems


def _is_number(value: object, least: float, below: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below
