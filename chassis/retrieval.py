"""Retrieval measured: a BEIR folder, exact search, and trec_eval's metrics.

Shape suffixes: Q queries, N documents, D embedding width, K ranks (depth of a ranking), C ranks up to a cutoff.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chassis.collectives import gather_rows, rank, world_size
from chassis.errors import DataError
from chassis.sources import read_json, read_lines

Relevant = Mapping[str, Mapping[str, int]]
"""For each query the grades of its judged documents; 0 and below: judged, and not relevant."""
Run = Mapping[str, Mapping[str, float]]
"""For each query the scores of the documents found, as trec_eval takes it."""

# --- BEIR folders ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str

    @property
    def full(self) -> str:
        """What a model is given."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Beir:
    """Queries, documents and judgements of one split."""

    name: str
    document_ids: list[str]
    documents: list[str]
    """Title and text."""
    query_ids: list[str]
    queries: list[str]
    relevant: dict[str, dict[str, int]]
    """For each query all its judgements."""


def read_beir(
    folder: str | Path, split: str = "test", *, max_queries: int | None = None, max_documents: int | None = None
) -> Beir:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each with .gz or without.

    Only queries with a relevant document in the split are kept.
    max_queries    only the first so many of them
    max_documents  only the documents judged for those queries (all of them) and the first others, up to so many
    Raises DataError, as `FILE:LINE: FIELD: what is wrong (what to do)`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (name one with corpus.jsonl, queries.jsonl and qrels/)")
    qrels_path = _split_path(folder, split)
    corpus_path, queries_path = (_plain_or_gz(folder / name) for name in ("corpus.jsonl", "queries.jsonl"))
    judged, query_lines, document_lines = _read_qrels(qrels_path)

    queries: dict[str, str] = {}
    for where, row in read_json(queries_path):
        query_id = _text(where, row, "_id")
        if query_id in queries:
            raise DataError(f"{where}: _id: query {query_id!r} occurs twice (keep one)")
        queries[query_id] = _text(where, row, "text")
    for query_id in judged:
        if query_id not in queries:
            where = f"{qrels_path}:{query_lines[query_id]}"
            raise DataError(f"{where}: query-id: no query {query_id!r} in {queries_path} (mend the one or the other)")

    kept = [query_id for query_id in queries if any(grade > 0 for grade in judged.get(query_id, {}).values())]
    if not kept:
        raise DataError(f"{qrels_path}:1: score: no query has a relevant document (a score of 1 or more)")
    kept = kept[:max_queries]
    needed = {document_id for query_id in kept for document_id in judged[query_id]}
    unknown = {document_id for grades in judged.values() for document_id in grades}
    room = None if max_documents is None else max(0, max_documents - len(needed))

    ids, texts = [], []
    for document in read_corpus(corpus_path):
        unknown.discard(document.id)
        if document.id not in needed and room is not None:
            if not room:
                continue
            room -= 1
        ids.append(document.id)
        texts.append(document.full)
    if unknown:
        first = min(unknown, key=lambda document_id: document_lines[document_id])
        where = f"{qrels_path}:{document_lines[first]}"
        raise DataError(f"{where}: corpus-id: no document {first!r} in {corpus_path} (mend the one or the other)")
    return Beir(
        name=folder.resolve().name,
        document_ids=ids,
        documents=texts,
        query_ids=kept,
        queries=[queries[query_id] for query_id in kept],
        relevant={query_id: judged[query_id] for query_id in kept},
    )


def read_corpus(path: str | Path) -> Iterator[Document]:
    """The documents of a BEIR folder, or of a `corpus.jsonl[.gz]` itself, in the file's order."""
    path = Path(path)
    path = _plain_or_gz(path / "corpus.jsonl" if path.is_dir() else path)
    seen: set[str] = set()
    for where, row in read_json(path):
        document_id = _text(where, row, "_id")
        if document_id in seen:
            raise DataError(f"{where}: _id: document {document_id!r} occurs twice (keep one)")
        seen.add(document_id)
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise DataError(f"{where}: title: must be text, got {type(title).__name__}")
        yield Document(document_id, title, _text(where, row, "text"))


def _split_path(folder: Path, split: str) -> Path:
    for path in (folder / "qrels" / f"{split}.tsv", folder / "qrels" / f"{split}.tsv.gz"):
        if path.is_file():
            return path
    there = sorted({path.name.removesuffix(".gz").removesuffix(".tsv") for path in folder.glob("qrels/*.tsv*")})
    raise DataError(f"{folder / 'qrels'}: no split {split!r} (there: {', '.join(there) or 'none'})")


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{path}: no such file, nor with .gz (BEIR's layout has corpus.jsonl, queries.jsonl and qrels/)")


def _read_qrels(path: Path) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, int]]:
    """Grades by query and document; the line that first names each query, and each document."""
    judged: dict[str, dict[str, int]] = {}
    query_lines: dict[str, int] = {}
    document_lines: dict[str, int] = {}
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3:
            raise DataError(f"{path}:{number}: row: {len(fields)} fields (write query-id, corpus-id, score)")
        if number == 1:
            if fields[2].lstrip("-").isdigit():
                raise DataError(f"{path}:1: row: no header (begin with query-id, corpus-id, score)")
            continue
        query_id, document_id, grade = fields
        try:
            found = judged.setdefault(query_id, {}).setdefault(document_id, int(grade))
        except ValueError:
            raise DataError(f"{path}:{number}: score: must be a whole number, got {grade!r}") from None
        if found != int(grade):
            pair = f"{query_id!r} with {document_id!r}"
            raise DataError(f"{path}:{number}: score: {pair} was judged {found} above (keep one)")
        query_lines.setdefault(query_id, number)
        document_lines.setdefault(document_id, number)
    return judged, query_lines, document_lines


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise DataError(f"{where}: {field}: not set (every row of BEIR's layout has it)")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field}: must be text, got {type(row[field]).__name__} (put it in quotes)")
    return row[field]


# --- search ----------------------------------------------------------------------------------


@torch.no_grad()
def search(query_QD: Tensor, document_ND: Tensor, k: int, *, block: int = 8192) -> tuple[Tensor, Tensor]:
    """The k documents of largest dot product for each query, exactly; of equal ones the first come first.

    query_QD, document_ND   any float dtype; the product is taken in fp32, on the queries' device
    block                   documents scored at once, so that memory is 1,024 x block however many there are
    returns                 (Q, K) fp32 scores, falling, and (Q, K) int64 rows of document_ND; K = min(k, N)
    """
    if query_QD.shape[1] != document_ND.shape[1]:
        raise ValueError(f"query and document widths differ: {query_QD.shape[1]} != {document_ND.shape[1]}")
    k = min(k, len(document_ND))
    best = []
    for part_qD in query_QD.float().split(1024):
        keys_qK = torch.empty(len(part_qD), 0, dtype=torch.int64, device=part_qD.device)
        for start in range(0, len(document_ND), block):
            scores = part_qD @ document_ND[start : start + block].to(part_qD.device).float().T
            keys = torch.cat([keys_qK, _keys(scores, start)], dim=1)
            keys_qK = keys.topk(min(k, keys.shape[1]), dim=1).values
        best.append(keys_qK)
    return _scores_and_rows(torch.cat(best))


def search_together(query_QD: Tensor, document_ND: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`search` by all ranks, each for its share of the queries on its device; every rank gets all, on the CPU."""
    shares = query_QD.tensor_split(world_size())
    found = search(shares[rank()].to(device), document_ND, k)
    scores_QK, index_QK = (gather_rows(x_qK, [len(share) for share in shares]).cpu() for x_qK in found)
    return scores_QK, index_QK


def top_k(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their columns, as `search` orders them."""
    return _scores_and_rows(_keys(scores_QN.float(), 0).topk(min(k, scores_QN.shape[1]), dim=1).values)


def _keys(scores: Tensor, first_row: int) -> Tensor:
    """int64 numbers that order as (score, then lower row): torch.topk alone orders equal scores as it likes.

    The bits of a float, read as an integer, order as the floats do once the negative ones are turned round.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


# --- metrics ---------------------------------------------------------------------------------


def as_run(beir: Beir, scores_QK: Tensor, index_QK: Tensor) -> dict[str, dict[str, float]]:
    """What `search` or `top_k` found, by ids; a score of -inf stands for no document."""
    ids = beir.document_ids
    rows = zip(beir.query_ids, scores_QK.tolist(), index_QK.tolist(), strict=True)
    return {
        query: {ids[i]: score for score, i in zip(scores, index, strict=True) if score != float("-inf")}
        for query, scores, index in rows
    }


def trec_order(run: Run) -> dict[str, list[str]]:
    """Each query's documents as trec_eval ranks them: by score, in fp32, and of equal ones the larger id first."""
    ranked = {}
    for query, scores in run.items():
        rounded = np.fromiter(scores.values(), np.float32, len(scores)).tolist()
        ranked[query] = [document for _, document in sorted(zip(rounded, scores, strict=True), reverse=True)]
    return ranked


def metrics(ranked: Mapping[str, Sequence[str]], relevant: Relevant, at: Sequence[int] = (10, 100)) -> dict[str, float]:
    """`ndcg_at_10`, `mrr_at_10`, `recall_at_10`, `precision_at_10`, `map_at_10`, and the same for each cutoff of `at`.

    Definitions are trec_eval's: nDCG takes the grade itself as gain and log2(rank + 1) as discount; the other metrics
    call relevant what has a grade of 1 or more. The mean is over all queries with a relevant document; one that
    `ranked` lacks counts as 0. The order is taken as handed in, so ties are settled there: `trec_order` settles them
    as trec_eval does.
    """
    return {name: float(value_Q.mean()) for name, value_Q in metrics_per_query(ranked, relevant, at).items()}


def metrics_per_query(
    ranked: Mapping[str, Sequence[str]], relevant: Relevant, at: Sequence[int] = (10, 100)
) -> dict[str, np.ndarray]:
    """What `metrics` takes the mean of: (Q,) float64 for each, in the order of `relevant`."""
    queries = [query for query, grades in relevant.items() if any(grade > 0 for grade in grades.values())]
    if not queries:
        raise ValueError("no query has a relevant document")
    deepest = max(at)
    gain_QK, ideal_QK, relevant_Q = np.zeros((len(queries), deepest)), np.zeros((len(queries), deepest)), []
    for q, query in enumerate(queries):
        grades, found = relevant[query], ranked.get(query, ())[:deepest]
        if len(set(found)) != len(found):
            raise ValueError(f"query {query!r}: a document is ranked twice")
        gain_QK[q, : len(found)] = [max(0, grades.get(document, 0)) for document in found]
        best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
        ideal_QK[q, : len(best)] = best[:deepest]
        relevant_Q.append(len(best))

    ranks_K = np.arange(1, deepest + 1)
    hit_QK, relevant_Q = gain_QK > 0, np.array(relevant_Q)
    precision_QK = hit_QK.cumsum(1) / ranks_K
    discount_K = 1 / np.log2(ranks_K + 1)
    results: dict[str, np.ndarray] = {}
    for c in at:
        hit_QC = hit_QK[:, :c]
        per_query = {
            "ndcg": (gain_QK[:, :c] @ discount_K[:c]) / (ideal_QK[:, :c] @ discount_K[:c]),
            "mrr": (hit_QC / ranks_K[:c]).max(1),
            "recall": hit_QC.sum(1) / relevant_Q,
            "precision": precision_QK[:, c - 1],
            "map": (hit_QC * precision_QK[:, :c]).sum(1) / relevant_Q,
        }
        results |= {f"{name}_at_{c}": value_Q for name, value_Q in per_query.items()}
    return results


def evaluate_run(beir: Beir, scores_QK: Tensor, index_QK: Tensor, at: Sequence[int] = (10, 100)) -> dict[str, float]:
    """The metrics of what was found, ordered as trec_eval would."""
    return metrics(trec_order(as_run(beir, scores_QK, index_QK)), beir.relevant, at)
