"""A trained folder to ONNX: tokens to the embedding, in fp32 and int8, with what another program needs to use it.

Shape suffixes: N texts, L tokens (padded), D embedding width.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.cli import entry_point
from lodestar.config.loader import Section
from lodestar.distributed.runtime import Placement
from lodestar.errors import ConfigError, LaunchError, ModelError
from lodestar.files import check_absent, make_folder

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

FP32, INT8 = "model.onnx", "model_int8.onnx"
ABOUT = "embedding.json"
ONE_FILE_BYTES = 1_900_000_000
"""A larger model keeps its weights beside it, in model.onnx.data: protobuf ends at 2 GiB."""
TOLERANCE = 1e-4
"""By how much an element of the fp32 embedding may differ from sentence-transformers' own."""
SAMPLE = ["", "A", "Which planets have RINGS?", "Ça va, 你好! " * 8, "one word after another " * 200]


class ExportRecipe(Section):
    """What is exported, and where to."""

    model: str
    """A folder (or hub name) in sentence-transformers' format."""
    output: str
    """The folder to write; it must not be there."""
    int8: bool = True
    """Also model_int8.onnx: weights in 8 bits, about a quarter of the size."""


def export_onnx(path: str | Path, folder: str | Path, *, int8: bool = True) -> dict[str, Any]:
    """`folder`, whole or absent: model.onnx (and model_int8.onnx), tokenizer.json, embedding.json.

    Inputs are (N, L) int64: input_ids, attention_mask, and token_type_ids where the tokenizer gives them, with N and L
    free. Outputs are fp32: sentence_embedding (N, D), as the model's own modules pool and normalise it, and
    last_hidden_state (N, L, D). Returns the files' sizes and how far the embeddings of a few texts are from
    sentence-transformers' own. Raises ConfigError where a library is missing or `folder` is there, ModelError for
    a model that cannot be exported or that differs once it is.
    """
    onnxruntime = _onnxruntime()
    check_absent(folder)

    from onnxruntime.quantization import QuantType, quantize_dynamic
    from tokenizers import Tokenizer

    from lodestar.files import replacing
    from retrieval.embedding.encode_texts import encode_texts
    from retrieval.embedding.load_model import load_model

    model = load_model(path, "cpu").float()
    about = _describe(path, model)
    found: dict[str, Any] = {}
    with replacing(Path(folder)) as tmp, _quiet():
        _write_tokenizer(model, tmp, about["max_length"])
        _write_fp32(path, model, tmp / FP32)
        if int8:
            # unsigned: signed weights saturate on CPUs without VNNI (docs/export.md)
            quantize_dynamic(tmp / FP32, tmp / INT8, weight_type=QuantType.QUInt8, per_channel=True)
        (tmp / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tokenizer = Tokenizer.from_file(str(tmp / "tokenizer.json"))
        expected_ND = encode_texts(model, SAMPLE, "query").vectors_ND.numpy()
        for name in [FP32, INT8] if int8 else [FP32]:
            session = onnxruntime.InferenceSession(tmp / name)
            got_ND = embed_onnx(session, tokenizer, SAMPLE, about["prompts"]["query"])
            files = tmp.glob(f"{name}*")
            found[name] = {
                "bytes": sum(file.stat().st_size for file in files),
                "largest_difference": float(abs(got_ND - expected_ND).max()),
                "lowest_cosine": float(_cosine(got_ND, expected_ND).min()),
            }
        if not found[FP32]["largest_difference"] <= TOLERANCE:
            far = found[FP32]["largest_difference"]
            raise ModelError(f"{path}: the export's embeddings are off by {far:.1e} (use sentence-transformers itself)")
    return found


def embed_onnx(session: Any, tokenizer: Any, texts: Sequence[str], prompt: str) -> np.ndarray:
    """(N, D) float32 by an onnxruntime session and the `tokenizers.Tokenizer` of an exported folder."""
    import numpy as np

    rows = tokenizer.encode_batch([prompt + text for text in texts])
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    names = [each.name for each in session.get_inputs()]
    feed = {name: np.array([getattr(row, fields[name]) for row in rows], dtype=np.int64) for name in names}
    return session.run(["sentence_embedding"], feed)[0]


def alone(placement: Placement) -> None:
    if placement.world_size > 1:
        raise LaunchError("launcher: one process writes the folder (start with python)")


def _onnxruntime() -> Any:
    """The library, if all that an export needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        what = f"{error.name or 'a library'} is not installed"
        raise ConfigError(f"onnx: {what} (pip install 'lodestar-embeddings[onnx]')") from None
    return onnxruntime


def _describe(path: str | Path, model: SentenceTransformer) -> dict[str, Any]:
    """embedding.json: what one has to know beside the graph and the tokenizer."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    pooling = next((module for module in model if isinstance(module, Pooling)), None)
    if pooling is None or not pooling.include_prompt:
        raise ModelError(f"{path}: its pooling leaves out the prompt, or it has none (only plain pooling is exported)")
    return {
        "max_length": model.max_seq_length,
        "width": model.get_embedding_dimension(),
        "pooling": pooling.pooling_mode,
        "normalised": any(isinstance(module, Normalize) for module in model),
        "prompts": {"query": "", "document": "", **model.prompts},
    }


def _write_tokenizer(model: SentenceTransformer, folder: Path, max_length: int | None) -> None:
    """With the cut and the padding in tokenizer.json: `encode_batch` alone gives what the model reads."""
    tokenizer: Any = model.tokenizer
    made = tokenizer.backend_tokenizer
    made.no_truncation()
    if max_length:
        made.enable_truncation(max_length)
    made.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    tokenizer.save_pretrained(folder)
    model[0].auto_model.config.save_pretrained(folder)  # type: ignore[operator,union-attr]


def _write_fp32(path: str | Path, model: SentenceTransformer, file: Path) -> None:
    import torch
    from torch import Tensor

    tokenizer: Any = model.tokenizer
    known = inspect.signature(model[0].auto_model.forward).parameters  # type: ignore[union-attr,arg-type]
    names = [name for name in tokenizer.model_input_names if name in known]
    example = tokenizer(["one", "two of them, padded"], padding=True, return_tensors="pt")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
            found = self.model(dict(zip(names, given, strict=True)))
            return found["sentence_embedding"], found["token_embeddings"]

    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        torch.onnx.export(
            Graph().eval(),
            tuple(example[name] for name in names),
            file,
            input_names=names,
            output_names=["sentence_embedding", "last_hidden_state"],
            dynamic_shapes=((shape,) * len(names),),
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > ONE_FILE_BYTES,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: torch.onnx cannot export it: {reason}") from None


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    import numpy as np

    return (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's advice: the comparison says what matters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- the command -----------------------------------------------------------------------------


def plan(recipe: ExportRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    check_absent(recipe.output)
    weights = sum(file.stat().st_size for file in Path(recipe.model).rglob("*.safetensors"))
    files = [FP32, *([INT8] if recipe.int8 else []), "tokenizer.json", ABOUT]
    return {
        "model": recipe.model,
        "output": recipe.output,
        "files": ", ".join(files),
        "weights_megabytes": round(weights / 1e6),
    }


def run(recipe: ExportRecipe, placement: Placement) -> int:
    alone(placement)
    make_folder(Path(recipe.output).parent, "output")
    for name, facts in export_onnx(recipe.model, recipe.output, int8=recipe.int8).items():
        print(
            f"{name}: {facts['bytes'] / 1e6:,.1f} MB; beside sentence-transformers: largest difference "
            f"{facts['largest_difference']:.1e}, lowest cosine {facts['lowest_cosine']:.4f}"
        )
    print(f"written: {recipe.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Export a trained model to ONNX.", schema=ExportRecipe, plan=plan, run=run)
