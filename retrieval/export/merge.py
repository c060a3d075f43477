"""Several models of one architecture as one: the weighted mean of their weights."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lodestar.files import check_absent, replacing
from lodestar.models.weight_files import TensorHeader
from retrieval.embedding.load_model import load_model
from retrieval.export.compatibility import check_mergeable, is_averaged

NOT_COPIED = ("*.safetensors", "*.bin", "*.onnx*", "onnx", "openvino", ".*", "README.md")
"""Files of the first model's folder that are not copied: weights in any form, and the description of the model."""


def merge(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    output: str | Path,
    *,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """The weighted mean of the models in `folders`, in fp64, as a sentence-transformers folder; whole or absent.

    weights   0 or more, in any unit: each is divided by their sum
    prompts   by role; those that it does not name are the first model's
    Everything else, the tensors' dtypes included, is the first model's. Raises as `check_mergeable`, and ConfigError if
    `output` exists.
    """
    check_absent(output)
    paths = [Path(folder) for folder in folders]
    first, *others = check_mergeable(paths)
    weights = [weight / math.fsum(weights) for weight in weights]
    with replacing(Path(output)) as tmp:
        shutil.copytree(paths[0], tmp, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
        for file in sorted({header.file for header in first.values()}):
            means = {
                header.name: _mean(header, [headers.get(name) for headers in others], weights)
                for name, header in first.items()
                if header.file == file
            }
            save_file(means, tmp / file.relative_to(paths[0]), metadata={"format": "pt"})
        _write_prompts(tmp / "config_sentence_transformers.json", prompts or {})
        (tmp / "README.md").write_text(_model_card(paths, weights), encoding="utf-8")
        load_model(tmp, "cpu")  # raises if it does not open


def _mean(first: TensorHeader, others: Sequence[TensorHeader | None], weights: Sequence[float]) -> Tensor:
    """A tensor of the first model's dtype; the first model's own if it is not averaged."""
    tensor = _read(first)
    if not is_averaged(first):
        return tensor
    total = tensor.double() * weights[0]
    for header, weight in zip(others, weights[1:], strict=True):
        assert header is not None
        total += weight * _read(header).double()
    return total.to(tensor.dtype)


def _read(header: TensorHeader) -> Tensor:
    with safe_open(header.file, framework="pt") as tensors:
        return tensors.get_tensor(header.name)


def _write_prompts(file: Path, prompts: Mapping[str, str]) -> None:
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config["prompts"] = {"query": "", "document": "", **config.get("prompts", {}), **prompts}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(paths: Sequence[Path], weights: Sequence[float]) -> str:
    names = [html.escape(str(path)).replace("|", "&#124;").replace("`", "&#96;") for path in paths]
    table = "\n".join(f"| {name} | {weight:.4g} |" for name, weight in zip(names, weights, strict=True))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, lodestar, merge]\n---\n\n"
        "# A merged text-embedding model\n\nIts weights are the weighted mean of these models' weights:\n\n"
        f"| model | weight |\n|---|---:|\n{table}\n\n"
        "Modules, tokenizer, configuration and, unless others were chosen, prompts are those of the first.\n"
    )
