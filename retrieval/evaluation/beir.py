"""Folders in BEIR's layout: corpus, queries, judgements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lodestar.data.readers import Row, read_json, read_lines
from lodestar.errors import DataError, naming, shown

Relevant = Mapping[str, Mapping[str, int]]
"""For each query the grades of its judged documents; 0 and below: judged as not relevant."""


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str

    @property
    def full(self) -> str:
        """The text that a model embeds."""
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
    """For each query all its judgements, as `Relevant`."""


def read_beir(
    folder: str | Path, split: str = "test", *, max_queries: int | None = None, max_documents: int | None = None
) -> Beir:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each with .gz or without.

    Only queries with a relevant document in the split remain.
    max_queries    only the first so many of them
    max_documents  only the documents judged for those queries (all of them) and the first others, up to so many
    Raises DataError, as `FILE:LINE: FIELD: what is wrong (what to do)`.
    """
    folder = Path(folder)
    corpus_path, queries_path, qrels_path = _find_files(folder, split)
    qrels = _read_qrels(qrels_path)
    queries = _read_queries(queries_path)
    if unknown := [query_id for query_id in qrels.grades if query_id not in queries]:
        where = f"{qrels_path}:{qrels.query_lines[unknown[0]]}"
        raise DataError(f"{where}: query-id: no query {unknown[0]!r} in {queries_path} (correct one of the two)")

    answered = [query_id for query_id in queries if any(grade > 0 for grade in qrels.grades.get(query_id, {}).values())]
    if not answered:
        raise DataError(f"{qrels_path}:1: score: no query has a relevant document (a score of 1 or more)")
    query_ids = answered[:max_queries]
    judged_ids = {document_id for query_id in query_ids for document_id in qrels.grades[query_id]}
    num_others = None if max_documents is None else max(0, max_documents - len(judged_ids))

    document_ids, documents, missing = [], [], dict(qrels.document_lines)
    for document in read_corpus(corpus_path):
        missing.pop(document.id, None)
        if document.id not in judged_ids and num_others is not None:
            if not num_others:
                continue
            num_others -= 1
        document_ids.append(document.id)
        documents.append(document.full)
    if missing:
        first = min(missing, key=lambda document_id: missing[document_id])
        where = f"{qrels_path}:{missing[first]}"
        raise DataError(f"{where}: corpus-id: no document {first!r} in {corpus_path} (correct one of the two)")
    return Beir(
        name=folder.resolve().name,
        document_ids=document_ids,
        documents=documents,
        query_ids=query_ids,
        queries=[queries[query_id] for query_id in query_ids],
        relevant={query_id: qrels.grades[query_id] for query_id in query_ids},
    )


def check_beir(folder: str | Path, split: str) -> None:
    """DataError where `evaluate.data` lacks a file, or the split's judgements are damaged; reads no text."""
    with naming("evaluate.data"):
        _read_qrels(_find_files(Path(folder), split)[-1])


def _find_files(folder: Path, split: str) -> tuple[Path, Path, Path]:
    """Corpus, queries and the split's judgements."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (name one with corpus.jsonl, queries.jsonl and qrels/)")
    qrels_path = _split_path(folder, split)
    return _plain_or_gz(folder / "corpus.jsonl"), _plain_or_gz(folder / "queries.jsonl"), qrels_path


def _read_queries(path: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    for where, row in read_json(path):
        query_id = _text(where, row, "_id")
        if query_id in queries:
            raise DataError(f"{where}: _id: query {query_id!r} occurs twice (keep one)")
        queries[query_id] = _text(where, row, "text")
    return queries


def read_corpus(path: str | Path) -> Iterator[Document]:
    """The documents of a BEIR folder, or of a `corpus.jsonl[.gz]` itself, in the file's order."""
    path = Path(path)
    path = _plain_or_gz(path / "corpus.jsonl" if path.is_dir() else path)
    document_ids: set[str] = set()
    for where, row in read_json(path):
        document_id = _text(where, row, "_id")
        if document_id in document_ids:
            raise DataError(f"{where}: _id: document {document_id!r} occurs twice (keep one)")
        document_ids.add(document_id)
        title = "" if row.get("title") is None else row["title"]
        if not isinstance(title, str):
            raise DataError(f"{where}: title: must be text, got {type(title).__name__} (put it in quotes)")
        yield Document(document_id, title, _text(where, row, "text"))


def _split_path(folder: Path, split: str) -> Path:
    for path in (folder / "qrels" / f"{split}.tsv", folder / "qrels" / f"{split}.tsv.gz"):
        if path.is_file():
            return path
    splits = sorted({path.name.removesuffix(".gz").removesuffix(".tsv") for path in folder.glob("qrels/*.tsv*")})
    raise DataError(f"{folder / 'qrels'}: no split {split!r} (known: {', '.join(splits) or 'none'})")


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{path}: no such file, nor with .gz (BEIR's layout has corpus.jsonl, queries.jsonl and qrels/)")


class _Qrels(NamedTuple):
    grades: dict[str, dict[str, int]]
    """By query and document."""
    query_lines: dict[str, int]
    """The line that first names each query."""
    document_lines: dict[str, int]


def _read_qrels(path: Path) -> _Qrels:
    qrels = _Qrels({}, {}, {})
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
            first_grade = qrels.grades.setdefault(query_id, {}).setdefault(document_id, int(grade))
        except ValueError:
            raise DataError(f"{path}:{number}: score: must be a whole number, got {shown(grade)} (mend it)") from None
        if first_grade != int(grade):
            pair = f"{query_id!r} with {document_id!r}"
            raise DataError(f"{path}:{number}: score: {pair} has the score {first_grade} above (keep one)")
        qrels.query_lines.setdefault(query_id, number)
        qrels.document_lines.setdefault(document_id, number)
    return qrels


def _text(where: str, row: Row, field: str) -> str:
    if field not in row:
        raise DataError(f"{where}: {field}: not set (every row of BEIR's layout has it)")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field}: must be text, got {type(row[field]).__name__} (put it in quotes)")
    return row[field]
