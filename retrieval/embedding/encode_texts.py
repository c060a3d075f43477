"""Texts to embeddings on one device, by sentence-transformers, in batches of similar length.

Shape suffixes: N texts, B texts of a batch, D embedding width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm import tqdm

from lodestar.config.schema import Precision
from lodestar.errors import ModelError
from lodestar.training.engine import autocast
from retrieval.embedding.config import Role


class TextEmbeddings(NamedTuple):
    vectors_ND: Tensor
    """fp32, on the CPU, in the order of the texts."""
    truncated: int
    """Number of texts that were longer than the model reads."""


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Role,
    *,
    batch_tokens: int | None = None,
    precision: Precision = "fp32",
    width: int | None = None,
    progress: bool = False,
) -> TextEmbeddings:
    """Embed texts with the model's own prompt for the role, longest first.

    batch_tokens  tokens of one batch, padding included; none: 4,096 on a CPU, 65,536 on a GPU
    width         number of leading dimensions to keep, normalised again (Matryoshka); none: all
    """
    without_prompt = partial(model.encode, prompt="")  # not even the model's default one
    encode = {"query": model.encode_query, "document": model.encode_document, "text": without_prompt}[role]
    token_counts, truncated = _token_counts(model, texts, role)
    longest_first = sorted(range(len(texts)), key=token_counts.__getitem__, reverse=True)
    max_tokens = batch_tokens or (4096 if model.device.type == "cpu" else 65536)
    result_ND, pending = torch.empty(len(texts), model.get_embedding_dimension() or 0), None
    bar = tqdm(total=len(texts), unit="text", disable=not progress, leave=False)
    with bar, torch.inference_mode(), autocast(model.device, precision):
        for indices in cut_batches(longest_first, token_counts, max_tokens):
            batch = [texts[i] for i in indices]
            batch_BD = encode(batch, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False)
            if batch_BD.shape[1] != result_ND.shape[1]:
                result_ND = torch.empty(len(texts), batch_BD.shape[1])
            if pending:  # copy one batch late: the GPU computes this batch meanwhile
                result_ND[pending[0]] = pending[1].float().cpu()
            pending = indices, batch_BD
            bar.update(len(batch))
        if pending:
            result_ND[pending[0]] = pending[1].float().cpu()
    if not result_ND.isfinite().all():
        raise ModelError(f"embeddings: not all are finite in {precision} (take fp32, or check the model)")
    if width is not None and width < result_ND.shape[1]:
        result_ND = torch.nn.functional.normalize(result_ND[:, :width], dim=1)
    return TextEmbeddings(result_ND, truncated)


def _token_counts(model: SentenceTransformer, texts: Sequence[str], role: Role) -> tuple[list[int], int]:
    """(tokens of each text as the model reads it, number of truncated texts)."""
    prompt = model.prompts.get(role) or ""
    token_ids = model.tokenizer([prompt + text for text in texts], verbose=False)["input_ids"] if texts else []
    max_length = model.max_seq_length or sys.maxsize
    return [min(max_length, len(ids)) for ids in token_ids], sum(len(ids) > max_length for ids in token_ids)


def cut_batches(longest_first: Sequence[int], token_counts: Sequence[int], max_tokens: int) -> Iterator[Sequence[int]]:
    """Cut indices, sorted by falling length, into batches of at most `max_tokens` after padding, or of one text."""
    start = 0
    while start < len(longest_first):
        size = max(1, max_tokens // max(1, token_counts[longest_first[start]]))
        yield longest_first[start : start + size]
        start += size
