"""Models and BM25 side by side on a BEIR folder: one table, one JSON.

Shape suffixes: Q queries, N documents, D embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from chassis.cli import door
from chassis.config import Section
from chassis.errors import DataError
from chassis.runtime import Placement
from chassis.schema import Evaluate

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from chassis.retrieval import Beir
    from contrastive.evaluation_report import View

COLUMNS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "recall@100"}
TIMEOUT_MINUTES = 30.0
"""How long a rank waits for the others."""
Row = dict[str, Any]
"""`model`, a label, and the metrics."""


class EvaluateRecipe(Section):
    """Retrieval of models that are trained already."""

    models: Annotated[list[str] | dict[str, str], Field(min_length=1)]
    """Folders (or hub names) in sentence-transformers' format; or the same, each under a label."""
    evaluate: Evaluate
    bm25: bool = True
    """Also BM25, and its mix with the last model."""
    output_dir: str | None = None
    """Where evaluation.json goes; none: nowhere."""
    precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""

    @model_validator(mode="after")
    def _on_something(self) -> EvaluateRecipe:
        if self.evaluate.data is None:
            raise ValueError("needs evaluate.data (name a BEIR folder)")
        return self

    @property
    def labelled(self) -> dict[str, str]:
        return self.models if isinstance(self.models, dict) else {path: path for path in self.models}


# --- models ----------------------------------------------------------------------------------


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Literal["query", "document"],
    *,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
) -> Tensor:
    """(N, D) fp32 on the CPU, in the order of `texts`, with the model's own prompt for the role.

    Ranks take the texts in turn, each embeds its own, and every rank gets them all.
    """
    import torch

    from chassis.collectives import agreed, gather_rows, rank, world_size
    from contrastive.embedder import encode_texts

    size = world_size()
    if len(texts) < size:
        raise DataError(f"{len(texts)} texts of a kind for {size} processes (start fewer)")
    with agreed():
        found_ND, _ = encode_texts(
            model, texts[rank() :: size], role, batch_tokens=batch_tokens, precision=precision, progress=progress
        )
    turns = [list(range(turn, len(texts), size)) for turn in range(size)]
    gathered_ND = gather_rows(found_ND, [len(turn) for turn in turns])
    return gathered_ND[torch.tensor([i for turn in turns for i in turn]).argsort()]


def evaluate_model(
    path: str | Path,
    beir: Beir,
    *,
    device: torch.device,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
    seen: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """The metrics of a model, and its run: (Q, K) scores and rows, deep enough to mix with another.

    seen  is shown query_QD, document_ND and the run
    """
    from chassis.retrieval import evaluate_run, search
    from contrastive.bm25 import POOL
    from contrastive.embedder import load_model

    model = load_model(path, device)
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "precision": precision, "progress": progress}
    query_QD = embed(model, beir.queries, "query", **how)
    document_ND = embed(model, beir.documents, "document", **how)
    scores_QK, index_QK = search(query_QD, document_ND, POOL)
    if seen:
        seen(query_QD, document_ND, scores_QK, index_QK)
    return evaluate_run(beir, scores_QK[:, :100], index_QK[:, :100]), (scores_QK, index_QK)


def compare(
    models: Mapping[str, str | Path],
    beir: Beir,
    *,
    device: torch.device,
    bm25: bool = True,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
    views: list[View] | None = None,
) -> list[Row]:
    """A row for BM25, one for each labelled model, and one for the last model mixed with BM25.

    views  is given what a report shows of each model
    """
    from chassis.retrieval import evaluate_run
    from contrastive.bm25 import POOL, fuse, rank_bm25
    from contrastive.evaluation_report import view

    rows: list[Row] = []
    bm25_run = rank_bm25(beir, POOL) if bm25 else None
    if bm25_run:
        rows.append({"model": "BM25", **evaluate_run(beir, bm25_run[0][:, :100], bm25_run[1][:, :100])})
    for last, (label, path) in enumerate(models.items(), 1 - len(models)):
        found, model_run = evaluate_model(
            path,
            beir,
            device=device,
            batch_tokens=batch_tokens,
            precision=precision,
            progress=progress,
            seen=None if views is None else lambda *seen, label=label: views.append(view(label, beir, *seen)),
        )
        rows.append({"model": label, **found})
        if bm25_run and last == 0:
            rows.append({"model": f"{label} + BM25", **evaluate_run(beir, *fuse([bm25_run, model_run], 100))})
    return rows


# --- telling ---------------------------------------------------------------------------------


def show(rows: Sequence[Row], title: str) -> None:
    """The table, the best of each column in bold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        best = {key: row[key] == max(other[key] for other in rows) for key in COLUMNS}
        cells = [Text(f"{row[key]:.4f}", style="bold" if best[key] else "") for key in COLUMNS]
        table.add_row(Text(row["model"]), *cells)
    Console().print(table)


def write(folder: str | Path, beir: Beir, split: str, rows: Sequence[Row]) -> Path:
    """`evaluation.json`: what was measured on, and the rows with all their metrics."""
    path = Path(folder) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"evaluation": beir.name, "split": split, "queries": len(beir.queries), "documents": len(beir.documents)}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({**facts, "rows": list(rows)}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


# --- the door --------------------------------------------------------------------------------


def plan(recipe: EvaluateRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    beir = _beir(recipe)
    return {
        "world_size": world_size,
        "models": ", ".join(recipe.labelled),
        "evaluation": beir.name,
        "split": recipe.evaluate.split,
        "queries": len(beir.queries),
        "documents": len(beir.documents),
        "texts_per_rank": -(-(len(beir.queries) + len(beir.documents)) // world_size),
        "characters": sum(map(len, beir.queries)) + sum(map(len, beir.documents)),
    }


def run(recipe: EvaluateRecipe, placement: Placement) -> int:
    import torch

    from chassis.peers import roll_call
    from chassis.runtime import joined
    from contrastive.evaluation_report import write_report

    beir = _beir(recipe)
    views: list[View] = []
    with joined(placement, timeout_minutes=TIMEOUT_MINUTES) as runtime, roll_call(runtime, TIMEOUT_MINUTES):
        rows = compare(
            recipe.labelled,
            beir,
            device=runtime.device if recipe.device == "auto" else torch.device("cpu"),
            bm25=recipe.bm25,
            precision=recipe.precision,
            progress=runtime.is_main and sys.stderr.isatty(),
            views=views if runtime.is_main and recipe.output_dir else None,
        )
    if placement.rank == 0:
        size = f"{len(beir.queries):,} queries, {len(beir.documents):,} documents"
        show(rows, f"{beir.name}, {recipe.evaluate.split}: {size}")
        if recipe.output_dir:
            print(f"written: {write(recipe.output_dir, beir, recipe.evaluate.split, rows)}")
            print(f"written: {write_report(recipe.output_dir, beir, recipe.evaluate.split, rows, views)}")
    return 0


def _beir(recipe: EvaluateRecipe) -> Beir:
    from chassis.retrieval import read_beir

    section = recipe.evaluate
    assert section.data is not None
    return read_beir(section.data, section.split, max_queries=section.max_queries, max_documents=section.max_documents)


def main(argv: Sequence[str] | None = None) -> int:
    return door(argv, usage="Measure models on a BEIR folder.", schema=EvaluateRecipe, plan=plan, run=run)
