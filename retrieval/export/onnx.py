"""A trained folder to ONNX: tokens to the embedding, in fp32 and int8, with what another program needs to use it.

Shape suffixes: N texts, L tokens (padded), D embedding width.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lodestar.errors import ModelError, first_line
from lodestar.files import check_absent, replacing
from retrieval.embedding.encode_texts import encode_texts
from retrieval.embedding.load_model import load_model
from retrieval.export.config import FP32_FILE, INFO_FILE, INT8_FILE
from retrieval.export.libraries import require_onnx

if TYPE_CHECKING:  # an optional library
    from onnxruntime import InferenceSession

ONE_FILE_BYTES = 1_900_000_000
"""A larger model keeps its weights beside it, in model.onnx.data: protobuf ends at 2 GiB."""
TOLERANCE = 1e-4
"""By how much an element of the fp32 embedding may differ from sentence-transformers' own."""
SAMPLE = ["", "A", "Which planets have RINGS?", "Ça va, 你好! " * 8, "one word after another " * 200]


class ExportedFile(NamedTuple):
    bytes: int
    largest_difference: float
    """Of an element of the embeddings of `SAMPLE` from sentence-transformers' own."""
    lowest_cosine: float


class EmbeddingInfo(TypedDict):
    """embedding.json: what a user has to know besides the graph and the tokenizer."""

    max_length: int | None
    width: int | None
    pooling: str | Sequence[str]
    normalised: bool
    prompts: dict[str, str]


def export_onnx(path: str | Path, folder: str | Path, *, int8: bool = True) -> dict[str, ExportedFile]:
    """`folder`, whole or absent: model.onnx (and model_int8.onnx), tokenizer.json, embedding.json.

    Inputs are (N, L) int64: input_ids, attention_mask, and token_type_ids where the tokenizer gives them, with N and L
    free. Outputs are fp32: sentence_embedding (N, D), as the model's own modules pool and normalise it, and
    last_hidden_state (N, L, D). Raises ConfigError if a library is missing or `folder` exists, ModelError for a model
    that cannot be exported or whose export differs.
    """
    require_onnx()
    check_absent(folder)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = load_model(path, "cpu").float()
    info = _embedding_info(path, model)
    with replacing(Path(folder)) as tmp, _quiet():
        _write_tokenizer(model, tmp, info["max_length"])
        _write_fp32(path, model, tmp / FP32_FILE)
        if int8:
            # unsigned: signed weights saturate on CPUs without VNNI (docs/deploy.md)
            quantize_dynamic(tmp / FP32_FILE, tmp / INT8_FILE, weight_type=QuantType.QUInt8, per_channel=True)
        (tmp / INFO_FILE).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files = _compare(model, tmp, [FP32_FILE, INT8_FILE] if int8 else [FP32_FILE], info["prompts"]["query"])
        difference = files[FP32_FILE].largest_difference
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{path}: the export's embeddings differ by {difference:.1e} (use sentence-transformers itself)"
            )
    return files


def _compare(model: SentenceTransformer, folder: Path, names: Sequence[str], prompt: str) -> dict[str, ExportedFile]:
    """Each exported file beside sentence-transformers, on the same texts."""
    from onnxruntime import InferenceSession

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected_ND = encode_texts(model, SAMPLE, "query").vectors_ND.numpy()
    files = {}
    for name in names:
        actual_ND = embed_onnx(InferenceSession(folder / name), tokenizer, SAMPLE, prompt)
        files[name] = ExportedFile(
            bytes=sum(file.stat().st_size for file in folder.glob(f"{name}*")),
            largest_difference=float(abs(actual_ND - expected_ND).max()),
            lowest_cosine=float(_cosine(actual_ND, expected_ND).min()),
        )
    return files


def embed_onnx(session: InferenceSession, tokenizer: Tokenizer, texts: Sequence[str], prompt: str) -> np.ndarray:
    """(N, D) float32 by the session and the tokenizer of an exported folder."""
    encodings = tokenizer.encode_batch([prompt + text for text in texts])
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    names = [argument.name for argument in session.get_inputs()]
    inputs = {
        name: np.array([getattr(encoding, fields[name]) for encoding in encodings], dtype=np.int64) for name in names
    }
    return np.asarray(session.run(["sentence_embedding"], inputs)[0])


def _embedding_info(path: str | Path, model: SentenceTransformer) -> EmbeddingInfo:
    pooling = next((module for module in model if isinstance(module, Pooling)), None)
    if pooling is None or not pooling.include_prompt:
        raise ModelError(f"{path}: its pooling leaves out the prompt, or it has none (only plain pooling is exported)")
    prompts = {role: prompt or "" for role, prompt in model.prompts.items()}
    return {
        "max_length": model.max_seq_length,
        "width": model.get_embedding_dimension(),
        "pooling": pooling.pooling_mode,
        "normalised": any(isinstance(module, Normalize) for module in model),
        "prompts": {"query": "", "document": "", **prompts},
    }


def _write_tokenizer(model: SentenceTransformer, folder: Path, max_length: int | None) -> None:
    """With truncation and padding in tokenizer.json: `encode_batch` alone gives what the model reads."""
    tokenizer = cast(PreTrainedTokenizerFast, model.tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    if max_length:
        backend.enable_truncation(max_length)
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    tokenizer.save_pretrained(folder)
    model[0].auto_model.config.save_pretrained(folder)  # type: ignore[operator,union-attr]


class _Graph(torch.nn.Module):
    """The model with its inputs by position, as the exporter wants them."""

    def __init__(self, model: SentenceTransformer, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs: Mapping[str, Tensor] = self.model(dict(zip(self.names, inputs, strict=True)))
        return outputs["sentence_embedding"], outputs["token_embeddings"]


def _write_fp32(path: str | Path, model: SentenceTransformer, file: Path) -> None:
    tokenizer = cast(PreTrainedTokenizerFast, model.tokenizer)
    parameters = inspect.signature(model[0].auto_model.forward).parameters  # type: ignore[union-attr,arg-type]
    names = [name for name in tokenizer.model_input_names if name in parameters]
    example = tokenizer(["one", "two of them, padded"], padding=True, return_tensors="pt")
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        torch.onnx.export(
            _Graph(model, names).eval(),
            tuple(example[name] for name in names),
            file,
            input_names=names,
            output_names=["sentence_embedding", "last_hidden_state"],
            dynamic_shapes=((shape,) * len(names),),
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > ONE_FILE_BYTES,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"{path}: torch.onnx cannot export it: {first_line(error)}") from None


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    return (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporter and the quantiser: the comparison shows whether they matter."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
