"""The texts of a recipe, read one after the other and cut into shards. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lodestar.data.readers import Row, find_sources, read_rows, row_id
from lodestar.errors import DataError, names, shown
from retrieval.embedding.config import EncodeRecipe


class Shard(NamedTuple):
    number: int
    ids: list[str]
    texts: list[str]


def files_of(recipe: EncodeRecipe) -> list[str]:
    """The recipe's texts; of a BEIR folder the file for the recipe's role."""
    (first, *others), name = recipe.texts, "queries" if recipe.role == "query" else "corpus"
    if not others:
        for path in (Path(first) / f"{name}.jsonl", Path(first) / f"{name}.jsonl.gz"):
            if path.is_file():
                return [str(path)]
    return recipe.texts


def read_texts(recipe: EncodeRecipe) -> Iterator[tuple[str, str]]:
    """(id, text) of each row, in order; a title precedes its text, as in BEIR."""
    number = 0
    for source in find_sources(files_of(recipe), "texts"):
        for where, row in read_rows(source):
            text = row.get(recipe.field)
            if not isinstance(text, str):
                problem = f"must be a text, got {type(text).__name__}"
                raise DataError(f"{where}: {recipe.field}: {problem} (name it in field; here: {names(row)})")
            title = row.get("title") if recipe.field == "text" else None
            if not isinstance(title, str | None):
                raise DataError(f"{where}: title: must be a text, got {shown(title)} (put it in quotes)")
            own_id = _id_of(where, row, recipe.id_field)
            yield str(number) if own_id is None else own_id, f"{title} {text}" if title else text
            number += 1


def _id_of(where: str, row: Row, id_field: str | None) -> str | None:
    """None for a row without an id."""
    for name in ("_id", "id") if id_field is None else (id_field,):
        if row.get(name) is not None:
            return row_id(where, name, row[name])
    if id_field is not None:
        raise DataError(f"{where}: {id_field}: not set (every row needs it, or leave id_field out)")
    return None


def no_rows(recipe: EncodeRecipe) -> DataError:
    return DataError(f"texts: {', '.join(recipe.texts)}: no row (name files with texts)")


def cut_shards(rows: Iterable[tuple[str, str]], size: int) -> Iterator[Shard]:
    """Shards of `size` rows, the last one shorter."""
    rows, number = iter(rows), 0
    while chunk := list(islice(rows, size)):
        yield Shard(number, [row_id for row_id, _ in chunk], [text for _, text in chunk])
        number += 1
