"""A sentence-transformers model from a folder or the hub, with every tensor of its encoder checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel
from transformers.utils import logging

from lodestar.distributed.collectives import rank
from lodestar.errors import ModelError, first_line, naming
from lodestar.models.cpu_linear import use_cpu_linear
from lodestar.models.folder_checks import find_folder
from lodestar.models.load import check_vocabulary
from lodestar.models.weight_files import FETCH
from retrieval.embedding.config import Prompts
from retrieval.embedding.known_models import resolve_prompts
from retrieval.embedding.model_folder import check_folder


def load_model(
    path: str | Path, device: torch.device | str, prompts: Prompts | None = None, field: str = "model"
) -> SentenceTransformer:
    """Load a sentence-transformers folder or hub name; ModelError for anything else, and for missing tensors.

    prompts   by role, replace the folder's own; none: those of the model card, where `known_models` has it
    field     of the recipe that names the model
    """
    with naming(field):
        return _load(path, device, prompts, field)


def _load(path: str | Path, device: torch.device | str, prompts: Prompts | None, field: str) -> SentenceTransformer:
    folder = find_folder(path, "")
    check_folder(folder, field, finite=True)
    prompts = announce_prompts(path, prompts)
    try:
        with _quiet_transformers():
            model = SentenceTransformer(str(folder), device=str(device), trust_remote_code=False).eval()
    except Exception as error:  # each kind of module fails in its own way
        raise ModelError(f"{path}: cannot be opened: {first_line(error)} ({FETCH})") from None
    check_vocabulary(model.tokenizer, str(path))
    use_cpu_linear(model)
    model.prompts |= prompts
    if missing := _missing_parameters(model, folder):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path}: {missing[0]}{more} not in its files (use the folder that the model was saved to)")
    return model


def announce_prompts(path: str | Path, prompts: Prompts | None) -> Prompts:
    """The prompts to use in place of the folder's own; rank 0 prints those that a model card gave."""
    resolved = resolve_prompts(path, prompts)
    if resolved and not prompts and rank() == 0:
        print(f"{path}: prompts of its model card: {resolved}", file=sys.stderr)
    return resolved


def _missing_parameters(model: SentenceTransformer, folder: Path) -> list[str]:
    """Encoder parameters that the folder does not hold: transformers initialises them randomly and only warns."""
    files = list(folder.glob("*.safetensors"))
    encoder = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if not files or encoder is None:
        return []
    saved = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118 (not a dict)
    prefix = f"{encoder.base_model_prefix}."
    names = (name for name, _ in encoder.named_parameters() if not name.startswith("pooler."))  # [CLS] needs no pooler
    return [name for name in names if not saved & {name, prefix + name, name.removeprefix(prefix)}]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bars and without transformers' report on tensors, which `_missing_parameters` replaces."""
    verbosity, bar_enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar_enabled:
            logging.enable_progress_bar()
