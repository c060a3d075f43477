"""Models and BM25 side by side on one task or many: one table, one JSON, and whether differences are luck.

Shape suffixes: N texts, D embedding width, I items of a test set.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.cli import entry_point
from lodestar.distributed.runtime import Placement
from lodestar.files import make_folder
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.config import Prompts
from retrieval.embedding.model_folder import check_folder, fingerprint
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.results import Result, Row, about, counts, show_all, show_differences, write_json
from retrieval.evaluation.tasks import Run, Task, measure_run, retrieval

if TYPE_CHECKING:
    import torch

    from retrieval.evaluation.beir import Beir
    from retrieval.evaluation.report import View

TIMEOUT_MINUTES = 600.0
"""How long a rank waits for the others, as while rank 0 has BM25 to compute; one that is gone is noticed at once."""


# --- models ----------------------------------------------------------------------------------


def evaluate_model(
    path: str | Path,
    beir: Beir,
    *,
    device: torch.device,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
) -> tuple[dict[str, float], Run]:
    """The metrics of a model, and its run: (Q, K) scores and rows, deep enough to mix with another."""
    from retrieval.embedding.distributed_embed import embed
    from retrieval.embedding.load_model import load_model

    how: dict[str, Any] = {"batch_tokens": batch_tokens, "precision": precision, "progress": progress}
    found = retrieval(beir).measure(partial(embed, load_model(path, device), **how), device)
    assert found.run is not None
    return found.metrics, found.run


def measure(
    models: Mapping[str, str | Path],
    tasks: Mapping[str, Task],
    *,
    device: torch.device,
    bm25: bool = True,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
    views: dict[str, list[View]] | None = None,
    work: Path | None = None,
    prompts: Mapping[str, Prompts] | None = None,
) -> dict[str, Result]:
    """For each task a row of each labelled model; for retrieval also BM25, and the last model mixed with it.

    views   is given what a report shows of each retrieval's models
    prompts by label, in place of the model's own
    work    where embeddings are kept, for a run that is interrupted; none: nowhere
    Rows with BM25 are rank 0's alone.
    """
    from lodestar.distributed.collectives import agreed, rank
    from retrieval.embedding.distributed_embed import embed
    from retrieval.embedding.load_model import load_model
    from retrieval.evaluation.bm25 import POOL, fuse, rank_bm25
    from retrieval.evaluation.report import view

    how: dict[str, Any] = {"batch_tokens": batch_tokens, "precision": precision, "progress": progress}
    results = {name: Result(task.facts) for name, task in tasks.items()}
    beirs = {name: task.beir for name, task in tasks.items() if bm25 and task.beir and rank() == 0}
    bm25_runs = {name: rank_bm25(beir, POOL) for name, beir in beirs.items()}
    for name, beir in beirs.items():
        results[name].add("BM25", measure_run(beir, bm25_runs[name]))
    for last, (label, path) in enumerate(models.items(), 1 - len(models)):
        own = (prompts or {}).get(label)
        with agreed():
            model = load_model(path, device, own)
            folder = work / fingerprint(str(path), own).replace("/", "--") if work else None
        embed_by_model = partial(embed, model, **how, folder=folder)
        for name, task in tasks.items():
            found = task.measure(embed_by_model, device)
            results[name].add(label, found)
            if views is not None and task.beir and found.vectors and found.run:
                views.setdefault(name, []).append(view(label, task.beir, *found.vectors, *found.run))
            if last == 0 and name in beirs and found.run:
                mixed = fuse([bm25_runs[name], found.run], 100)
                results[name].add(f"{label} + BM25", measure_run(beirs[name], mixed))
    return results


def compare(models: Mapping[str, str | Path], beir: Beir, **how: Any) -> list[Row]:
    """`measure` on one BEIR folder: its rows."""
    return measure(models, {beir.name: retrieval(beir)}, **how)[beir.name].rows


def write(folder: str | Path, beir: Beir, split: str, rows: Sequence[Row]) -> Path:
    """`evaluation.json` of one BEIR folder: what was measured on, and the rows with all their metrics."""
    return write_json(folder, {**about(beir.name, retrieval(beir, split).facts), "rows": list(rows)})


# --- the command -----------------------------------------------------------------------------


def plan(recipe: EvaluateRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    missing = PlanWarnings([])
    for path in recipe.labelled.values():
        missing.or_default(None, partial(check_folder, path), "it cannot be measured")
    found: dict[str, Any] = {"world_size": world_size, "models": ", ".join(recipe.labelled)}
    read = {
        name: missing.or_default(None, partial(section.read, name), "not counted")
        for name, section in recipe.all_tasks.items()
    }
    tasks = {name: task for name, task in read.items() if task}
    for name, task in tasks.items():
        if name in recipe.tasks:
            found[f"task {name}"] = f"{task.facts['kind']}: {counts(task.facts)}"
        else:
            found |= about(name, task.facts)
    found["texts_per_rank"] = -(-sum(len(task.texts) for task in tasks.values()) // world_size)
    characters = sum(len(text) for task in tasks.values() for text in task.texts)
    return found | {"characters": characters, "missing": missing.lines}


def run(recipe: EvaluateRecipe, placement: Placement) -> int:
    tasks = read_tasks(recipe)
    for path in recipe.labelled.values():
        check_folder(path)  # now, not after hours with the first
    import torch

    from lodestar.distributed.collectives import agreed
    from lodestar.distributed.session import distributed_session
    from retrieval.evaluation.report import write_report

    work = Path(recipe.output_dir) / "embeddings.work" if recipe.output_dir else None
    views: dict[str, list[View]] = {}
    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        if recipe.output_dir:
            with agreed():
                make_folder(recipe.output_dir, "output_dir")
        results = measure(
            recipe.labelled,
            tasks,
            device=runtime.device if recipe.device == "auto" else torch.device("cpu"),
            bm25=recipe.bm25,
            batch_tokens=recipe.batch_tokens,
            precision=recipe.precision,
            progress=runtime.is_main and sys.stderr.isatty(),
            views=views if runtime.is_main and recipe.output_dir else None,
            work=work,
            prompts=recipe.prompts,
        )
    if placement.rank == 0:
        first = next(iter(recipe.labelled))
        differences = {name: result.differences(first, recipe.bootstrap) for name, result in results.items()}
        show_all(results)
        show_differences(differences, recipe.bootstrap)
        if recipe.output_dir and work:
            content: dict[str, Any] = {"tasks": {}}
            for name, result in results.items():
                found = {"rows": result.rows, "differences": differences[name]}
                if name in recipe.tasks:
                    content["tasks"][name] = result.facts | found
                else:  # that of `evaluate`
                    content = about(name, result.facts) | found | content
            print(f"written: {write_json(recipe.output_dir, content)}")
            for name, seen in views.items():
                beir, result = tasks[name].beir, results[name]
                assert beir is not None
                file = Path(recipe.output_dir) / (
                    f"evaluation-{name}.html" if name in recipe.tasks else "evaluation.html"
                )
                print(f"written: {write_report(file, beir, result.facts['split'], result.rows, seen)}")
            shutil.rmtree(work, ignore_errors=True)
    return 0


def read_tasks(recipe: EvaluateRecipe) -> dict[str, Task]:
    """In the order of the recipe; DataError for what is wrong with their files."""
    return {name: section.read(name) for name, section in recipe.all_tasks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    usage = "Measure models: retrieval, classification, clustering, STS, pair classification."
    return entry_point(argv, usage=usage, schema=EvaluateRecipe, plan=plan, run=run)
