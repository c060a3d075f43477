"""An encoder with its tokenizer as a folder that transformers and sentence-transformers open."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lodestar.config.loader import dump
from lodestar.config.schema import Pooling
from lodestar.files import write_json
from lodestar.models.folder_checks import LEGACY_KEYS
from lodestar.models.load import parameter_aliases
from lodestar.models.pooling_config import POOLINGS

IN_WORDS: dict[Pooling, str] = {
    "cls": "[CLS] vector",
    "mean": "mean of the tokens' vectors",
    "last_token": "vector of the last token",
}


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None,
    max_length: int,
    prompts: Mapping[str, str],
    card: str,
    pooling: Pooling = "cls",
) -> None:
    """Write a transformers folder that is a sentence-transformers folder too: pooling, normalisation, prompts.

    weights   the model's parameters, one name for each; none: those in the model (an engine may have sharded them)
    prompts   by role: `encode_query` applies "query", `encode_document` "document"
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = None
    if weights is not None:  # all names of a tied tensor, of which transformers keeps one
        state = {
            name: tensor
            for names in parameter_aliases(model).values()
            for tensor in [weights[names[0]]]
            for name in names
        }
    model.save_pretrained(folder, state_dict=state)
    tokenizer.model_max_length = max_length
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.no_truncation()  # options of the last call are no part of the model
    backend.no_padding()
    tokenizer.save_pretrained(folder)
    # In the keys that every version of sentence-transformers and other servers read; newer ones know shorter keys too.
    mode = next(name for name, ours in POOLINGS.items() if ours == pooling)
    modes = {"pooling_mode": mode, **{key: name == mode for name, key in LEGACY_KEYS.items()}}
    pooling_config = {"word_embedding_dimension": model.config.hidden_size, **modes, "include_prompt": True}
    for name, config in (("1_Pooling", pooling_config), ("2_Normalize", {})):
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / "config.json", config)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": version("sentence-transformers")},
            "prompts": {"query": "", "document": "", **prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(title: str, recipe: BaseModel, results: Mapping[str, Any], pooling: Pooling) -> str:
    """README.md of a model folder: usage, results of the training run, and its recipe."""
    values = json.dumps({key: value for key, value in results.items() if value is not None}, indent=2)
    values, recipe_text = (html.escape(text, quote=False) for text in (values, dump(recipe)))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, lodestar]\n---\n\n"
        f"# {title}\n\nThe embedding is the normalised {IN_WORDS[pooling]}.\n\n"
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        'queries = model.encode_query(["a question"])  # the query prompt is applied\n'
        'passages = model.encode_document(["a passage"])\n```\n\n'
        # Not between backticks, which a text of the recipe may hold too.
        f"## Training\n\n<pre>\n{values}\n</pre>\n\n<pre>\n{recipe_text}</pre>\n"
    )
