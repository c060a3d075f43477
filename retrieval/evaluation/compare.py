"""Models and BM25 side by side on one task or many: one table, one JSON file, and the significance of differences.

Shape suffixes: N texts, D embedding width, I items of a test set.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lodestar.config.schema import Precision
from lodestar.distributed.collectives import agreed, rank
from lodestar.distributed.runtime import Placement
from lodestar.distributed.session import distributed_session
from lodestar.files import kept_file_problem, make_folder
from retrieval.embedding.cache import search_cache_file, write_embeddings
from retrieval.embedding.config import Prompts
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.embedder import check_devices
from retrieval.embedding.load_model import load_model
from retrieval.embedding.model_folder import fingerprint
from retrieval.evaluation.beir import Beir
from retrieval.evaluation.bm25 import FUSION_DEPTH, FUSIONS, rank_bm25
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.report import Row, make_view, write_report
from retrieval.evaluation.results import Difference, Result, show_all, show_differences, write_json
from retrieval.evaluation.task_metrics import measure_ranking
from retrieval.evaluation.tasks import Task, retrieval_task

TIMEOUT_MINUTES = 600.0
"""How long a rank waits for the others, as while rank 0 computes BM25; a lost rank is noticed at once."""


def compare(
    models: Mapping[str, str | Path], beir: Beir, *, device: torch.device, bm25: bool = True, progress: bool = False
) -> list[Row]:
    """`measure` on one BEIR folder: its rows."""
    tasks = {beir.name: retrieval_task(beir)}
    return measure(models, tasks, device=device, bm25=bm25, progress=progress)[beir.name].rows


def measure(
    models: Mapping[str, str | Path],
    tasks: Mapping[str, Task],
    *,
    device: torch.device,
    bm25: bool = True,
    fusion: str = "scores",
    batch_tokens: int | None = None,
    precision: Precision = "fp32",
    progress: bool = False,
    prompts: Mapping[str, Prompts] | None = None,
    with_views: bool = False,
    cache_dir: Path | None = None,
    search_cache: bool = False,
) -> dict[str, Result]:
    """A row of each labelled model for each task; for retrieval also BM25, and its fusion with the last model.

    prompts     by label, replace the model's own
    with_views  also collect what a report shows of retrieval tasks
    cache_dir   keeps embeddings for an interrupted run; none: no cache
    search_cache   also write documents' embeddings for search; the caller sees to fp32 and the model's own prompts
    Only rank 0 has the rows with BM25.
    """
    results = {name: Result(task) for name, task in tasks.items()}
    bm25_rankings = {}
    for name, task in tasks.items():
        if bm25 and task.beir and rank() == 0:
            bm25_rankings[name] = rank_bm25(task.beir, FUSION_DEPTH)
            results[name].add("BM25", measure_ranking(task.beir, bm25_rankings[name]))
    last_label = list(models)[-1]
    for label, path in models.items():
        model_prompts = (prompts or {}).get(label)
        with agreed():
            model_hash = fingerprint(str(path), model_prompts) if cache_dir or search_cache else ""
            model = load_model(path, device, model_prompts, "models")
            cache = cache_dir / model_hash.replace("/", "--") if cache_dir else None
        embed_by_model = partial(
            embed, model, batch_tokens=batch_tokens, precision=precision, progress=progress, folder=cache
        )
        for name, task in tasks.items():
            result = task.measure(embed_by_model, device)
            results[name].add(label, result)
            if not task.beir or not result.retrieval:
                continue
            if search_cache and Path(path).is_dir():
                with agreed():
                    _write_search_cache(Path(path), model_hash, task.beir, result.retrieval.document_ND)
            if with_views:
                results[name].views.append(make_view(label, task.beir, result.retrieval))
            if label == last_label and name in bm25_rankings:
                fused = FUSIONS[fusion]([bm25_rankings[name], result.retrieval.ranking], 100)
                results[name].add(f"{label} + BM25", measure_ranking(task.beir, fused))
    return results


def _write_search_cache(model_folder: Path, model_hash: str, beir: Beir, document_ND: Tensor) -> None:
    """By rank 0, unless it is there."""
    if rank() == 0 and kept_file_problem(file := search_cache_file(model_folder, model_hash, beir.documents)):
        write_embeddings(file, document_ND)


def write(folder: str | Path, beir: Beir, split: str, rows: Sequence[Row]) -> Path:
    """`evaluation.json` of one BEIR folder: its sizes, and the rows with all their metrics."""
    return write_json(folder, {**retrieval_task(beir, split).describe(beir.name), "rows": list(rows)})


# --- the command -----------------------------------------------------------------------------


def evaluate(recipe: EvaluateRecipe, tasks: Mapping[str, Task], placement: Placement) -> dict[str, Result]:
    """Measure the recipe's models on all ranks; rank 0 prints tables and writes the output folder.

    Returns the results by task; rank 0 alone has the rows with BM25.
    """
    if recipe.device != "auto":
        check_devices([recipe.device], "device")
    cache_dir = Path(recipe.output_dir) / "embeddings.work" if recipe.output_dir else None
    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        if recipe.output_dir:
            with agreed():
                make_folder(recipe.output_dir, "output_dir")
        results = measure(
            recipe.labelled_models,
            tasks,
            device=runtime.device if recipe.device == "auto" else torch.device(recipe.device),
            bm25=recipe.bm25,
            fusion=recipe.fusion,
            batch_tokens=recipe.batch_tokens,
            precision=recipe.precision,
            progress=runtime.is_main and sys.stderr.isatty(),
            prompts=recipe.prompts,
            with_views=runtime.is_main and bool(recipe.output_dir),
            cache_dir=cache_dir,
            search_cache=recipe.search_cache,
        )
    if placement.rank != 0:
        return results
    differences = {name: result.differences(recipe.baselines, recipe.bootstrap) for name, result in results.items()}
    show_all(results)
    show_differences(differences, recipe.bootstrap)
    if recipe.output_dir and cache_dir:
        _write_files(recipe, Path(recipe.output_dir), results, differences)
        shutil.rmtree(cache_dir, ignore_errors=True)
    return results


def _write_files(
    recipe: EvaluateRecipe, folder: Path, results: Mapping[str, Result], differences: Mapping[str, list[Difference]]
) -> None:
    """`evaluation.json` and a report for each retrieval task; that of `evaluate` is at the top level."""
    content: dict[str, object] = {}
    content_of_tasks: dict[str, object] = {}
    for name, result in results.items():
        rows = {"rows": result.rows, "differences": differences[name]}
        if name in recipe.tasks:
            content_of_tasks[name] = result.task.facts | rows
        else:
            content = result.task.describe(name) | rows
    print(f"written: {write_json(folder, content | {'tasks': content_of_tasks})}")
    for name, result in results.items():
        if result.views and result.task.beir and result.task.split:
            file = folder / (f"evaluation-{name}.html" if name in recipe.tasks else "evaluation.html")
            path = write_report(file, result.task.beir, result.task.split, result.rows, result.views)
            print(f"written: {path}")
