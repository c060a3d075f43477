"""The corpus that is indexed or searched: where it is, its rows as a database stores them.

Loads without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from lodestar.data.readers import Source, find_sources, read_rows, row_id
from lodestar.errors import ConfigError, DataError, names
from retrieval.search.vector_stores import Row

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""What a field of a row may be called."""


def find_corpus(corpus: str) -> list[Source]:
    """`corpus.jsonl[.gz]` of a BEIR folder, or any files of rows."""
    beir = [path for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path := Path(corpus) / name).is_file()]
    return find_sources([str(beir[0]) if beir else corpus], "corpus")


def read_chunks(sources: Sequence[Source], size: int) -> Iterator[list[Row]]:
    """`size` rows at a time, the last chunk smaller."""
    rows = (as_row(location, row) for source in sources for location, row in read_rows(source))
    while chunk := list(islice(rows, size)):
        yield chunk


def as_row(location: str, row: Mapping[str, object]) -> Row:
    """`id`, `title`, `text` and the fields of the row and of its `metadata`, as text; DataError for what cannot be."""
    fields = dict(row)
    if isinstance(metadata := fields.get("metadata"), dict):
        del fields["metadata"]
        fields = metadata | fields
    name = "_id" if "_id" in fields else "id"
    document_id = row_id(location, name, fields.pop(name, None))
    if not isinstance(fields.get("text"), str):
        raise DataError(f"{location}: text: must be text (give each row one)")
    for field in fields:
        if not _FIELD.fullmatch(field) or field in ("id", "vector"):
            problem = "not a name for metadata (letters, digits and _, not id or vector)"
            raise DataError(f"{location}: {names([field])}: {problem}")
    texts = {field: _as_text(value) for field, value in fields.items() if value is not None}
    return {"title": "", **texts, "id": document_id}


def check_where(where: Mapping[str, object], place: str = "where") -> dict[str, str]:
    """The values as text, as rows have them; ConfigError at `place` for what cannot be a field."""
    for field in where:
        if not _FIELD.fullmatch(field):
            raise ConfigError(f"{place}: {field}: not the name of a field (letters, digits and _)")
    return {field: _as_text(value) for field, value in where.items()}


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def corpus_of_run(model_folder: Path) -> str:
    """The `search_corpus` in the summary.json of the run that trained the model."""
    summary = model_folder.resolve().parent / "summary.json"
    try:
        corpus = json.loads(summary.read_text(encoding="utf-8")).get("search_corpus")
    except (OSError, ValueError, AttributeError):
        corpus = None
    if not isinstance(corpus, str):
        raise ConfigError(f"{summary}: search_corpus: not there (give --corpus a corpus.jsonl or a BEIR folder)")
    return corpus
