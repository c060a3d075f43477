"""evaluation.html: what is behind the metrics of an evaluation, in one self-contained file.

Shape suffixes: Q queries, N documents, D embedding width, K ranks, M points of the map, P pairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lodestar.reporting.html import MUTED, SERIES, Html, Mark, escape, facts, figure, number, page, table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from torch import Tensor

    from retrieval.evaluation.beir import Beir

_MAP_POINTS = 1000
_NEGATIVES = 20
"""Documents drawn for each query, to score against."""
_SHOWN = 5
"""Of the best queries, and of the worst."""
_CHARACTERS = 400
"""Of a text."""


class Ranked(NamedTuple):
    """A query, and how it was answered."""

    query: str
    ndcg: float
    """At 10."""
    margin: float
    """Score of the best relevant document, less that of the best other one."""
    relevant: tuple[str, float, int | None]
    """The best relevant document, its score, and its rank if it was found."""
    instead: tuple[str, float] | None
    """The best of the others."""


@dataclass(frozen=True)
class View:
    """What the report shows of one model; small, so that embeddings need not stay in memory."""

    model: str
    positive_P: np.ndarray
    """Scores of queries with their relevant documents."""
    hardest_Q: np.ndarray
    """Of each query with the best document that is not relevant."""
    negative_P: np.ndarray
    """Of queries with documents drawn at random."""
    ranked: list[Ranked]
    """The worst first."""
    point_MD: np.ndarray
    """Embeddings for the map: queries, then documents."""
    point_texts: list[str]
    map_queries: int
    pairs: list[tuple[int, int]]
    """Points of queries and of documents that are relevant to them."""


def view(
    model: str, beir: Beir, query_QD: Tensor, document_ND: Tensor, scores_QK: Tensor, index_QK: Tensor, *, seed: int = 0
) -> View:
    """Look at a model's embeddings and what `retrieval.evaluation.metrics.search` found by them; rows as in `beir`."""
    import torch

    rng = random.Random(seed)
    row_of = {document_id: row for row, document_id in enumerate(beir.document_ids)}
    positive, hardest, negative, ranked = [], [], [], []
    for q, query_id in enumerate(beir.query_ids):
        grades = {row_of[document_id]: grade for document_id, grade in beir.relevant[query_id].items()}
        own = [row for row, grade in grades.items() if grade > 0]
        drawn = [row for row in (rng.randrange(len(row_of)) for _ in range(_NEGATIVES)) if row not in grades]
        scores = (document_ND[own + drawn].float() @ query_QD[q].float()).tolist()
        positive += scores[: len(own)]
        negative += scores[len(own) :]
        found = index_QK[q].tolist()
        pairs = zip(found, scores_QK[q].tolist(), strict=True)
        other = next(((row, score) for row, score in pairs if grades.get(row, 0) <= 0), None)
        hardest += [other[1]] if other else []
        ranked.append(_ranked(beir, q, dict(zip(own, scores, strict=False)), found, other))
    ranked.sort(key=lambda each: (each.ndcg, each.margin))

    queries = sorted(rng.sample(range(len(beir.queries)), min(len(beir.queries), _MAP_POINTS // 4)))
    answers = [
        (q, row_of[document_id])
        for q in queries
        for document_id, grade in beir.relevant[beir.query_ids[q]].items()
        if grade > 0
    ][: _MAP_POINTS // 4]
    room = _MAP_POINTS - len(queries)
    drawn = rng.sample(range(len(row_of)), min(len(row_of), room))
    rows = list(dict.fromkeys([row for _, row in answers] + drawn))[:room]
    place = {row: len(queries) + i for i, row in enumerate(rows)}
    return View(
        model=model,
        positive_P=torch.tensor(positive).numpy(),
        hardest_Q=torch.tensor(hardest).numpy(),
        negative_P=torch.tensor(negative).numpy(),
        ranked=ranked if len(ranked) <= 2 * _SHOWN else ranked[:_SHOWN] + ranked[-_SHOWN:],
        point_MD=torch.cat([query_QD[queries], document_ND[rows]]).float().numpy(),
        point_texts=[beir.queries[q] for q in queries] + [beir.documents[row] for row in rows],
        map_queries=len(queries),
        pairs=[(queries.index(q), place[row]) for q, row in answers],
    )


def _ranked(
    beir: Beir, q: int, own: Mapping[int, float], found: Sequence[int], other: tuple[int, float] | None
) -> Ranked:
    """own: scores of the relevant documents; found: rows, the best first; other: the best that is not relevant."""
    from retrieval.evaluation.metrics import metrics

    query_id = beir.query_ids[q]
    ids = [beir.document_ids[row] for row in found[:10]]
    best = max(own, key=lambda row: own[row])
    return Ranked(
        query=beir.queries[q],
        ndcg=metrics({query_id: ids}, {query_id: beir.relevant[query_id]}, at=[10])["ndcg_at_10"],
        margin=own[best] - (other[1] if other else 0.0),
        relevant=(beir.documents[best], own[best], found.index(best) + 1 if best in found else None),
        instead=(beir.documents[other[0]], other[1]) if other else None,
    )


# --- telling ---------------------------------------------------------------------------------


def write_report(
    path: str | Path, beir: Beir, split: str, rows: Sequence[Mapping[str, Any]], views: Sequence[View]
) -> Path:
    """The table of `rows` as `retrieval.evaluation.compare.compare` gives them, and each model's view."""
    metrics = [name for name in rows[0] if name != "model"]
    best = {name: max(row[name] for row in rows) for name in metrics}
    cells = [
        [n.replace("_at_", "@"), *(Html(f"<b>{r[n]:.4f}</b>" if r[n] == best[n] else f"{r[n]:.4f}") for r in rows)]
        for n in metrics
    ]
    parts: list[str] = [
        f"<h1>{escape(beir.name)}</h1><p class=muted>Retrieval, split {escape(split)}</p>",
        facts({"Queries": len(beir.queries), "Documents": len(beir.documents), "Models": len(views)}),
        "<h2>Metrics</h2>",
        table(cells, ["", *(row["model"] for row in rows)]),
    ]
    for each in views:
        parts += [f"<h2>{escape(each.model)}</h2>", _histogram(each), _map(each)]
        half = len(each.ranked) // 2 if len(each.ranked) < 2 * _SHOWN else _SHOWN
        parts += ["<h3>Worst queries</h3>", *map(_article, each.ranked[:half])]
        parts += ["<h3>Best queries</h3>", *map(_article, reversed(each.ranked[half:]))]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return page(Path(path), f"{beir.name}, {split}", parts)


def _histogram(of: View) -> Html:
    """Densities, for there are many more negatives than positives."""
    import numpy as np

    groups = {"relevant": of.positive_P, "hardest negative": of.hardest_Q, "random": of.negative_P}
    groups = {name: scores for name, scores in groups.items() if len(scores)}
    edges = np.linspace(min(s.min() for s in groups.values()), max(s.max() for s in groups.values()) + 1e-6, 51)

    def draw(axes: Axes) -> list[Mark]:
        shares = [np.histogram(scores, edges)[0] / len(scores) for scores in groups.values()]
        for i, share in enumerate(shares):
            axes.stairs(100 * share, edges, color=f"C{i}", fill=True, alpha=0.25)
            axes.stairs(100 * share, edges, color=f"C{i}", linewidth=1.4)
        axes.set_xlabel("score (dot product)")
        axes.set_ylabel("% of pairs")
        axes.margins(x=0.01)
        return [
            Mark(edges[j], edges[j + 1], f"{edges[j]:.3f} to {edges[j + 1]:.3f}\n" + "\n".join(
                f"{name} {share[j]:.1%}" for name, share in zip(groups, shares, strict=True)
            ))
            for j in range(50)
        ]  # fmt: skip

    key = [
        Html(f"{escape(name)} <span class=muted>mean {scores.mean():.3f}, {len(scores):,} pairs</span>")
        for name, scores in groups.items()
    ]
    told = "The more the relevant and the hardest negatives overlap, the more is missed."
    return figure(f"Scores: {of.model}", draw, key=key, caption=told, height=2.6)


def _map(of: View, *, seed: int = 0) -> Html:
    """t-SNE of queries and documents, a line from each query to what is relevant to it."""
    if len(of.point_MD) < 4:
        return Html("")
    from sklearn.manifold import TSNE

    reduced = TSNE(perplexity=min(30, (len(of.point_MD) - 1) / 3), init="random", random_state=seed)
    xy_M2 = reduced.fit_transform(of.point_MD)

    def draw(axes: Axes) -> list[Mark]:
        from matplotlib.collections import LineCollection

        axes.add_collection(
            LineCollection([xy_M2[list(pair)] for pair in of.pairs], colors=MUTED, linewidths=0.5, zorder=0)
        )
        for start, end, colour, size in ((of.map_queries, None, SERIES[1], 7), (0, of.map_queries, SERIES[0], 14)):
            axes.scatter(*xy_M2[start:end].T, s=size, color=colour, linewidths=0, alpha=0.75)
        axes.set(aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        side = 0.006 * (xy_M2.max() - xy_M2.min())
        return [
            Mark(x - side, x + side, _cut(text, 100), y - side, y + side)
            for (x, y), text in zip(xy_M2.tolist(), of.point_texts, strict=True)
        ]

    told = "t-SNE: what is near in many dimensions is near here; distances between groups mean nothing."
    key = [f"{of.map_queries:,} queries", f"{len(of.point_MD) - of.map_queries:,} documents"]
    told += " A line leads from a query to what is relevant to it: short lines are good."
    return figure(f"Map: {of.model}", draw, key=key, caption=told, height=5.2)


def _article(ranked: Ranked) -> Html:
    text, score, rank = ranked.relevant
    place = "not found" if rank is None else f"rank {rank}"
    lines = [f"<p><b>Relevant</b>, {place}, score {score:.3f}: {escape(_cut(text))}</p>"]
    if ranked.instead and (rank is None or rank > 1):
        lines.append(f"<p><b>Found instead</b>, score {ranked.instead[1]:.3f}: {escape(_cut(ranked.instead[0]))}</p>")
    head = f"<b>{escape(_cut(ranked.query))}</b> <span class=muted>nDCG@10 {number(ranked.ndcg)}</span>"
    return Html(f"<article>{head}{''.join(lines)}</article>")


def _cut(text: str, most: int = _CHARACTERS) -> str:
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"
