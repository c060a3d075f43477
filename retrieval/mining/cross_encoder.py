"""A cross-encoder that scores positives and negatives, as the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from lodestar.errors import ModelError, first_line
from lodestar.models.folder_checks import check_plain_model, find_folder
from lodestar.models.weight_files import FETCH


def load_cross_encoder(name: str, device: torch.device) -> CrossEncoder:
    """ModelError for one that cannot be opened, or that does not give one score for a pair."""
    folder = find_folder(name, "cross_encoder")
    check_plain_model(folder, "cross_encoder: ", finite=True)
    try:
        model = CrossEncoder(str(folder), device=str(device), trust_remote_code=False)
    except Exception as error:  # each family fails in its own way
        raise ModelError(f"cross_encoder: {name}: cannot be opened: {first_line(error)} ({FETCH})") from None
    if model.num_labels != 1:
        raise ModelError(f"cross_encoder: {name}: gives {model.num_labels} scores for a pair (take one that gives one)")
    return model


def rescore(
    model: CrossEncoder, examples: Sequence[Mapping[str, Any]], *, progress: bool = False
) -> list[Mapping[str, Any]]:
    """The examples with the model's logits as scores; its usual sigmoid would leave a softmax hardly any difference."""
    pairs = [(example["query"], text) for example in examples for text in (*example["pos"], *example["neg"])]
    logits = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=progress)
    scores = iter(float(logit) for logit in logits)
    return [
        {
            **example,
            "pos_scores": [next(scores) for _ in example["pos"]],
            "neg_scores": [next(scores) for _ in example["neg"]],
        }
        for example in examples
    ]
