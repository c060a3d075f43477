"""An encoder with its tokenizer as a folder that transformers and sentence-transformers open as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lodestar.config.loader import dump
from lodestar.files import write_json
from lodestar.models.load import _aliases


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None,
    max_length: int,
    prompts: Mapping[str, str],
    card: str,
) -> None:
    """A transformers folder that is a sentence-transformers folder too: CLS pooling, normalise, prompts, a card.

    weights   the model's parameters, one name for each, if they lie elsewhere than in the model (sharded engines)
    prompts   by role: `encode_query` applies "query", `encode_document` "document"
    """
    from sentence_transformers import __version__ as sentence_transformers_version
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    folder.mkdir(parents=True, exist_ok=True)
    state = None
    if weights is not None:  # every name of a tied tensor, because transformers keeps the one that it knows
        state = {name: tensor for names in _aliases(model).values() for tensor in [weights[names[0]]] for name in names}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.model_max_length = max_length
    made: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    made.no_truncation()  # what the last call asked for is no part of the model
    made.no_padding()
    tokenizer.save_pretrained(folder)
    width = model.config.hidden_size
    for place, module in (("1_Pooling", Pooling(width, pooling_mode="cls")), ("2_Normalize", Normalize())):
        (folder / place).mkdir(exist_ok=True)
        module.save(str(folder / place))
    kind = "sentence_transformers.models"
    modules = [("", f"{kind}.Transformer"), ("1_Pooling", f"{kind}.Pooling"), ("2_Normalize", f"{kind}.Normalize")]
    listed = [{"idx": i, "name": str(i), "path": path, "type": name} for i, (path, name) in enumerate(modules)]
    write_json(folder / "modules.json", listed)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": sentence_transformers_version},
            "prompts": {"query": "", "document": "", **prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(title: str, recipe: BaseModel, facts: Mapping[str, Any]) -> str:
    """README.md of a model folder: how it was trained, in numbers."""
    values = json.dumps({key: value for key, value in facts.items() if value is not None}, indent=2)
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, lodestar]\n---\n\n"
        f"# {title}\n\nThe embedding is the normalised [CLS] vector.\n\n"
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        'queries = model.encode_query(["a question"])  # the query prompt is applied\n'
        'passages = model.encode_document(["a passage"])\n```\n\n'
        f"## Training\n\n```json\n{values}\n```\n\n```yaml\n{dump(recipe)}```\n"
    )
