"""Texts to embeddings on one device, by sentence-transformers, in batches of similar length.

Shape suffixes: N texts, B texts of a batch, C texts of a chunk, L tokens, D embedding width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import Tensor
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel

from lodestar.config.schema import Precision
from lodestar.errors import ModelError
from lodestar.models.last_layer import compute_cls_only
from lodestar.training.engine import autocast
from retrieval.embedding.config import Role

CHUNK = 1024
"""Texts that are tokenized at once, while the model reads those before."""
PROMPT_NAMES: dict[Role, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "text": (),  # not even the model's default one
}
"""The names under which a model may hold a role's prompt, as sentence-transformers looks for them."""


class TextEmbeddings(NamedTuple):
    vectors_ND: Tensor
    """fp32, on the CPU, in the order of the texts."""
    truncated: int
    """Number of texts that were longer than the model reads."""


@dataclass(frozen=True)
class _Tokens:
    """What the model reads of one chunk of texts."""

    indices: Sequence[int]
    """Of the texts."""
    inputs: BatchEncoding
    """Tensors of shape (C, L), and what is not one of each text."""
    token_counts: list[int]
    truncated: int
    """Number of texts that were longer than the model reads."""

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """The model's inputs of some texts of the chunk, without columns that are padding in all of them."""
        mask_BL = self.inputs["attention_mask"][rows]
        columns_L = mask_BL.any(0)
        shape_CL = self.inputs["attention_mask"].shape
        return {
            name: value[rows][:, columns_L] if isinstance(value, Tensor) and value.shape == shape_CL else value
            for name, value in self.inputs.items()
        }


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

    batch_tokens  tokens of one batch, padding included; none: 2,048 on a CPU, 65,536 on a GPU
    width         number of leading dimensions to keep, normalised again (Matryoshka); none: all
    """
    max_tokens = batch_tokens or (2048 if model.device.type == "cpu" else 65536)
    result_ND, truncated = torch.empty(len(texts), model.get_embedding_dimension() or 0), 0
    pending: tuple[list[int], Tensor] | None = None
    bar = tqdm(total=len(texts), unit="text", disable=not progress, leave=False)
    with bar, torch.inference_mode(), autocast(model.device, precision):
        for chunk in _tokenized(model, texts, role):
            truncated += chunk.truncated
            longest_first = sorted(range(len(chunk.indices)), key=chunk.token_counts.__getitem__, reverse=True)
            with _cls_only(model, chunk.inputs["attention_mask"]):
                for rows in cut_batches(longest_first, chunk.token_counts, max_tokens):
                    outputs = model(batch_to_device(chunk.batch(rows), model.device), **_task(role))
                    batch_BD = truncate_embeddings(outputs["sentence_embedding"], model.truncate_dim)
                    if batch_BD.shape[1] != result_ND.shape[1]:
                        result_ND = torch.empty(len(texts), batch_BD.shape[1])
                    if pending:  # copy one batch late: the GPU computes this batch meanwhile
                        result_ND[pending[0]] = pending[1].float().cpu()
                    pending = [chunk.indices[row] for row in rows], batch_BD
                    bar.update(len(rows))
        if pending:
            result_ND[pending[0]] = pending[1].float().cpu()
    if not result_ND.isfinite().all():
        raise ModelError(f"embeddings: not all are finite in {precision} (take fp32, or check the model)")
    if width is not None and width < result_ND.shape[1]:
        result_ND = torch.nn.functional.normalize(result_ND[:, :width], dim=1)
    return TextEmbeddings(result_ND, truncated)


@contextmanager
def _cls_only(model: SentenceTransformer, mask_CL: Tensor) -> Iterator[None]:
    """Inside, the encoder computes no last hidden states but those that the pooling reads, if these are of [CLS].

    mask_CL   of the texts that are read inside: padded on the left, their first tokens stand elsewhere
    """
    undo: Callable[[], None] | None = None
    match list(model.children()):
        case [
            Transformer(model=PreTrainedModel() as encoder),
            Pooling(pooling_mode="cls", include_prompt=True),
            *others,
        ] if (
            encoder.config._attn_implementation == "sdpa"  # with flash attention the pooling looks among all tokens
            and all(isinstance(module, (Dense, Normalize)) for module in others)
            and mask_CL[:, 0].all()
        ):
            undo = compute_cls_only(encoder)
    try:
        yield
    finally:
        if undo:
            undo()


def _tokenized(model: SentenceTransformer, texts: Sequence[str], role: Role) -> Iterator[_Tokens]:
    """Chunks of texts of similar length, longest first, each tokenized while the model reads the one before."""
    longest_first = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    ahead: Future[_Tokens] | None = None
    with ThreadPoolExecutor(1) as pool:
        for start in range(0, len(texts), CHUNK):
            ready, ahead = ahead, pool.submit(_tokenize, model, texts, role, longest_first[start : start + CHUNK])
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


def _tokenize(model: SentenceTransformer, texts: Sequence[str], role: Role, indices: Sequence[int]) -> _Tokens:
    prompt = next((model.prompts[name] for name in PROMPT_NAMES[role] if name in model.prompts), "") or ""
    chunk = [texts[i] for i in indices]
    inputs: Any = model.preprocess(chunk, prompt=prompt, **_task(role))
    if encodings := getattr(inputs, "encodings", None):
        truncated = sum(bool(encoding.overflowing) for encoding in encodings)
    else:  # a tokenizer written in Python does not tell
        whole = model.tokenizer([prompt + text for text in chunk], verbose=False)["input_ids"]
        truncated = sum(len(ids) > (model.max_seq_length or sys.maxsize) for ids in whole)
    return _Tokens(indices, inputs, inputs["attention_mask"].sum(1).tolist(), truncated)


def _task(role: Role) -> dict[str, str]:
    """Models with a module for each role choose by it."""
    return {} if role == "text" else {"task": role}


def cut_batches(longest_first: Sequence[int], token_counts: Sequence[int], max_tokens: int) -> Iterator[Sequence[int]]:
    """Cut indices, sorted by falling length, into batches of at most `max_tokens` after padding, or of one text."""
    start = 0
    while start < len(longest_first):
        size = max(1, max_tokens // max(1, token_counts[longest_first[start]]))
        yield longest_first[start : start + size]
        start += size
