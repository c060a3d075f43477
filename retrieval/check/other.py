"""The checks of the recipes that do not train: every file that they name is read whole. Loads without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from lodestar.errors import LodestarError
from lodestar.files import check_absent
from lodestar.models.folder_checks import check_plain_model, embedding_width
from retrieval.check.training import CheckReport, add_prompts, check_output
from retrieval.embedding.cli import BYTES_PER_DIMENSION
from retrieval.embedding.config import EncodeRecipe
from retrieval.embedding.corpus import read_texts
from retrieval.embedding.model_folder import check_folder, check_width, fingerprint
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.tasks import task_of
from retrieval.export.compatibility import check_tensors
from retrieval.export.config import ExportRecipe, MergeRecipe
from retrieval.export.libraries import require_onnx
from retrieval.mining.config import MineRecipe
from retrieval.mining.texts import check_files, read_examples
from retrieval.search.config import IndexRecipe
from retrieval.search.corpus import find_corpus, read_chunks
from retrieval.search.store_record import check_record, read_record

_CHUNK = 1000


def check_evaluate(recipe: EvaluateRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    for path in recipe.labelled_models.values():
        _check_model(path, report, "models")
    for name in recipe.all_tasks:
        if (task := report.attempt(partial(task_of, recipe, name))) is not None:
            report.facts[f"task {name}"] = f"{task.kind}: {task.counts_in_words}"
    if recipe.output_dir:
        check_output(recipe.output_dir, "output_dir", report)
    return report


def check_encode(recipe: EncodeRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    _check_model(recipe.model, report)
    report.attempt(partial(check_width, recipe.model, recipe.output.width, "output.width"))
    report.facts["rows"] = rows = report.attempt(lambda: _count(read_texts(recipe)))
    check_output(recipe.output.dir, "output.dir", report, _output_bytes(recipe, rows or 0))
    return report


def _output_bytes(recipe: EncodeRecipe, rows: int) -> int:
    with suppress(LodestarError):
        width = recipe.output.width or embedding_width(Path(recipe.model)) or 0
        return int(rows * width * BYTES_PER_DIMENSION[recipe.output.dtype])
    return 0


def check_index(recipe: IndexRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    _check_model(recipe.model, report)
    report.attempt(partial(check_width, recipe.model, recipe.encode.width, "encode.width"))
    report.facts["chunks"] = report.attempt(lambda: _count(read_chunks(find_corpus(recipe.corpus), _CHUNK)))
    record = report.attempt(partial(read_record, recipe.store))
    if record is not None:
        identity = report.attempt(partial(fingerprint, recipe.model, recipe.prompts))
        report.attempt(partial(check_record, recipe.store, record, recipe.model, identity or ""))
    if recipe.store.path is not None:
        check_output(recipe.store.path, "store.path", report)
    return report


def check_mine(recipe: MineRecipe, world_size: int) -> CheckReport:
    report, corpus = CheckReport(), recipe.corpus_recipe
    _check_model(recipe.model, report)
    if recipe.cross_encoder and Path(recipe.cross_encoder).exists():
        report.attempt(partial(check_plain_model, Path(recipe.cross_encoder), "cross_encoder: ", finite=True))
    report.attempt(partial(check_files, recipe))
    report.facts["queries"] = report.attempt(lambda: _count(read_examples(recipe)))
    if corpus is not None:
        report.facts["corpus_rows"] = report.attempt(lambda: _count(read_texts(corpus)))
    check_output(recipe.work, "output", report)
    return report


def check_export(recipe: ExportRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    _check_model(recipe.model, report)
    weights = sum(file.stat().st_size for file in Path(recipe.model).glob("*.safetensors") if file.is_file())
    report.attempt(partial(check_absent, recipe.output))
    report.attempt(require_onnx)
    check_output(Path(recipe.output).parent, "output", report, 2 * weights)
    return report


def check_merge(recipe: MergeRecipe, world_size: int) -> CheckReport:
    """The tensors; `lodestar merge --plan` compares vocabularies and settings too."""
    report, folders = CheckReport(), [Path(model.path) for model in recipe.models]
    if (headers := report.attempt(partial(check_tensors, folders))) is not None:
        report.facts["tensors"] = len(headers[0])
    report.attempt(partial(check_absent, recipe.output))
    check_output(Path(recipe.output).parent, "output", report)
    return report


def _check_model(path: str, report: CheckReport, field: str = "model") -> None:
    report.attempt(partial(check_folder, path, field, finite=True))
    add_prompts(path, report)


def _count(items: Iterable[object]) -> int:
    """Read to the end."""
    last = deque(enumerate(items, 1), maxlen=1)
    return last[0][0] if last else 0
