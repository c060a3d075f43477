"""evaluation.html: what is behind the metrics of a retrieval task, in one self-contained file.

Shape suffixes: Q queries, N documents, D embedding width, K ranks, M points of the map, P pairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from sklearn.manifold import TSNE

from lodestar.reporting.html import MUTED, SERIES, Mark, facts, figure, number, page, table
from retrieval.evaluation.beir import Beir
from retrieval.evaluation.metrics import metrics
from retrieval.evaluation.tasks import RetrievalOutput

Row = dict[str, str | float]
"""`model`, a label, and the metrics by name."""
_MAP_POINTS = 1000
_RANDOM_NEGATIVES = 20
"""Documents drawn for each query, to compare scores with."""
_NUM_EXAMPLES = 5
"""Of the best queries, and of the worst."""
_MAX_CHARACTERS = 400
"""Of a text."""


class ScoredDocument(NamedTuple):
    row: int
    score: float


class QueryResult(NamedTuple):
    """A query and the documents that decide its metrics."""

    query: str
    ndcg_at_10: float
    margin: float
    """Score of the best relevant document minus that of the best other one."""
    relevant: str
    """The best relevant document."""
    relevant_score: float
    relevant_rank: int | None
    """none: not among the ranked documents."""
    other: str | None
    """The best document that is not relevant."""
    other_score: float


@dataclass(frozen=True)
class View:
    """What the report shows of one model; small, so that embeddings need not stay in memory."""

    model: str
    positive_P: np.ndarray
    """Scores of queries with their relevant documents."""
    hardest_Q: np.ndarray
    """Score of each query with the best document that is not relevant."""
    negative_P: np.ndarray
    """Scores of queries with random documents."""
    query_results: list[QueryResult]
    """The worst first."""
    point_MD: np.ndarray
    """Embeddings for the map: queries, then documents."""
    point_texts: list[str]
    map_queries: int
    pairs: list[tuple[int, int]]
    """Points of queries and of documents that are relevant to them."""


def make_view(model: str, beir: Beir, output: RetrievalOutput, *, seed: int = 0) -> View:
    """Condense a model's embeddings and ranking into what the report shows."""
    rng = random.Random(seed)
    query_QD, document_ND, (scores_QK, index_QK) = output
    row_of = {document_id: row for row, document_id in enumerate(beir.document_ids)}
    positive, hardest, negative, query_results = [], [], [], []
    for q, query_id in enumerate(beir.query_ids):
        grades = {row_of[document_id]: grade for document_id, grade in beir.relevant[query_id].items()}
        relevant = [row for row, grade in grades.items() if grade > 0]
        draws = [rng.randrange(len(row_of)) for _ in range(_RANDOM_NEGATIVES)]
        random_rows = [row for row in draws if row not in grades]
        scores = (document_ND[relevant + random_rows].float() @ query_QD[q].float()).tolist()
        positive += scores[: len(relevant)]
        negative += scores[len(relevant) :]
        ranked_rows: list[int] = index_QK[q].tolist()
        first_other = next((k for k, row in enumerate(ranked_rows) if grades.get(row, 0) <= 0), None)
        other = None
        if first_other is not None:
            other = ScoredDocument(ranked_rows[first_other], float(scores_QK[q, first_other]))
            hardest.append(other.score)
        query_results.append(_query_result(beir, q, dict(zip(relevant, scores, strict=False)), ranked_rows, other))
    query_results.sort(key=lambda result: (result.ndcg_at_10, result.margin))
    if len(query_results) > 2 * _NUM_EXAMPLES:
        query_results = query_results[:_NUM_EXAMPLES] + query_results[-_NUM_EXAMPLES:]

    queries = sorted(rng.sample(range(len(beir.queries)), min(len(beir.queries), _MAP_POINTS // 4)))
    answers = [
        (q, row_of[document_id])
        for q in queries
        for document_id, grade in beir.relevant[beir.query_ids[q]].items()
        if grade > 0
    ][: _MAP_POINTS // 4]
    num_documents = _MAP_POINTS - len(queries)
    random_rows = rng.sample(range(len(row_of)), min(len(row_of), num_documents))
    rows = list(dict.fromkeys([row for _, row in answers] + random_rows))[:num_documents]
    point_of_row = {row: len(queries) + i for i, row in enumerate(rows)}
    return View(
        model=model,
        positive_P=np.array(positive, np.float32),
        hardest_Q=np.array(hardest, np.float32),
        negative_P=np.array(negative, np.float32),
        query_results=query_results,
        point_MD=torch.cat([query_QD[queries], document_ND[rows]]).float().numpy(),
        point_texts=[beir.queries[q] for q in queries] + [beir.documents[row] for row in rows],
        map_queries=len(queries),
        pairs=[(queries.index(q), point_of_row[row]) for q, row in answers],
    )


def _query_result(
    beir: Beir,
    q: int,
    relevant_scores: Mapping[int, float],
    ranked_rows: Sequence[int],
    other: ScoredDocument | None,
) -> QueryResult:
    """relevant_scores   by the rows of the relevant documents
    ranked_rows       of documents, the best first
    other             the best document that is not relevant
    """
    query_id = beir.query_ids[q]
    top_10 = {query_id: [beir.document_ids[row] for row in ranked_rows[:10]]}
    best = max(relevant_scores, key=lambda row: relevant_scores[row])
    return QueryResult(
        query=beir.queries[q],
        ndcg_at_10=metrics(top_10, {query_id: beir.relevant[query_id]}, at=[10])["ndcg_at_10"],
        margin=relevant_scores[best] - (other.score if other else 0.0),
        relevant=beir.documents[best],
        relevant_score=relevant_scores[best],
        relevant_rank=ranked_rows.index(best) + 1 if best in ranked_rows else None,
        other=beir.documents[other.row] if other else None,
        other_score=other.score if other else 0.0,
    )


# --- the page --------------------------------------------------------------------------------


def write_report(path: str | Path, beir: Beir, split: str, rows: Sequence[Row], views: Sequence[View]) -> Path:
    """A table of the rows, then a section for each view."""
    metric_names = [name for name in rows[0] if name != "model"]
    best = {name: max(float(row[name]) for row in rows) for name in metric_names}
    cells = [
        [name.replace("_at_", "@")]
        + [Markup(f"<b>{row[name]:.4f}</b>" if row[name] == best[name] else f"{row[name]:.4f}") for row in rows]
        for name in metric_names
    ]
    parts: list[str] = [
        f"<h1>{escape(beir.name)}</h1><p class=muted>Retrieval, split {escape(split)}</p>",
        facts({"Queries": len(beir.queries), "Documents": len(beir.documents), "Models": len(views)}),
        "<h2>Metrics</h2>",
        table(cells, ["", *(str(row["model"]) for row in rows)]),
    ]
    for view in views:
        results = view.query_results
        half = min(len(results) // 2, _NUM_EXAMPLES)
        parts += [f"<h2>{escape(view.model)}</h2>", _histogram(view), _map(view)]
        parts += ["<h3>Worst queries</h3>", *map(_article, results[:half])]
        parts += ["<h3>Best queries</h3>", *map(_article, reversed(results[half:]))]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return page(Path(path), f"{beir.name}, {split}", parts)


def _histogram(view: View) -> Markup:
    """Fractions of each group, because there are many more negatives than positives."""
    groups = {"relevant": view.positive_P, "hardest negative": view.hardest_Q, "random": view.negative_P}
    groups = {name: scores for name, scores in groups.items() if len(scores)}
    edges = np.linspace(min(s.min() for s in groups.values()), max(s.max() for s in groups.values()) + 1e-6, 51)

    def draw(axes: Axes) -> list[Mark]:
        fractions = {name: np.histogram(scores, edges)[0] / len(scores) for name, scores in groups.items()}
        for i, fraction in enumerate(fractions.values()):
            axes.stairs(100 * fraction, edges, color=f"C{i}", fill=True, alpha=0.25)
            axes.stairs(100 * fraction, edges, color=f"C{i}", linewidth=1.4)
        axes.set_xlabel("score (dot product)")
        axes.set_ylabel("% of pairs")
        axes.margins(x=0.01)
        marks = []
        for j, (left, right) in enumerate(pairwise(edges.tolist())):
            lines = [f"{left:.3f} to {right:.3f}", *(f"{name} {fractions[name][j]:.1%}" for name in groups)]
            marks.append(Mark(left, right, "\n".join(lines)))
        return marks

    key = [
        Markup(f"{escape(name)} <span class=muted>mean {scores.mean():.3f}, {len(scores):,} pairs</span>")
        for name, scores in groups.items()
    ]
    caption = "The more the hardest negatives overlap with the relevant documents, the more the model misses."
    return figure(f"Scores: {view.model}", draw, key=key, caption=caption, height=2.6)


def _map(view: View, *, seed: int = 0) -> Markup:
    """t-SNE of queries and documents, with a line from each query to its relevant documents."""
    if len(view.point_MD) < 4:
        return Markup("")
    tsne = TSNE(perplexity=min(30, (len(view.point_MD) - 1) / 3), init="random", max_iter=500, random_state=seed)
    xy_M2 = tsne.fit_transform(view.point_MD)

    def draw(axes: Axes) -> list[Mark]:
        lines = [xy_M2[list(pair)] for pair in view.pairs]
        axes.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.5, zorder=0))
        axes.scatter(*xy_M2[view.map_queries :].T, s=7, color=SERIES[1], linewidths=0, alpha=0.75)
        axes.scatter(*xy_M2[: view.map_queries].T, s=14, color=SERIES[0], linewidths=0, alpha=0.75)
        axes.set(aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        radius = 0.006 * (xy_M2.max() - xy_M2.min())
        return [
            Mark(x - radius, x + radius, _shorten(text, 100), y - radius, y + radius)
            for (x, y), text in zip(xy_M2.tolist(), view.point_texts, strict=True)
        ]

    key = [f"{view.map_queries:,} queries", f"{len(view.point_MD) - view.map_queries:,} documents"]
    caption = (
        "t-SNE: points that are close in the embedding space are close here; distances between groups mean nothing. "
        "A line connects a query with each relevant document: short lines are good."
    )
    return figure(f"Map: {view.model}", draw, key=key, caption=caption, height=5.2)


def _article(result: QueryResult) -> Markup:
    rank = result.relevant_rank
    place = "not found" if rank is None else f"rank {rank}"
    relevant = escape(_shorten(result.relevant))
    lines = [f"<p><b>Relevant</b>, {place}, score {result.relevant_score:.3f}: {relevant}</p>"]
    if result.other is not None and rank != 1:
        other = escape(_shorten(result.other))
        lines.append(f"<p><b>Found instead</b>, score {result.other_score:.3f}: {other}</p>")
    ndcg = f"<span class=muted>nDCG@10 {number(result.ndcg_at_10)}</span>"
    return Markup(f"<article><b>{escape(_shorten(result.query))}</b> {ndcg}{''.join(lines)}</article>")


def _shorten(text: str, max_characters: int = _MAX_CHARACTERS) -> str:
    return text if len(text) <= max_characters else text[:max_characters].rsplit(" ", 1)[0] + " …"
