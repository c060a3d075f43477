"""The texts of a recipe, read one after the other and cut into shards. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lodestar.data.readers import find_sources, read_rows
from lodestar.errors import DataError
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
                raise DataError(
                    f"{where}: {recipe.field}: must be a text, got {type(text).__name__} (name it in field)"
                )
            id_fields = ("_id", "id") if recipe.id_field is None else (recipe.id_field,)
            row_id = next((row[name] for name in id_fields if row.get(name) is not None), None)
            if row_id is None and recipe.id_field is not None:
                raise DataError(f"{where}: {recipe.id_field}: not set (every row needs it, or leave id_field out)")
            title = row.get("title") if recipe.field == "text" else None
            yield str(number if row_id is None else row_id), f"{title} {text}" if title else text
            number += 1


def no_rows(recipe: EncodeRecipe) -> DataError:
    return DataError(f"texts: {', '.join(recipe.texts)}: no row (name files with texts)")


def cut_shards(rows: Iterable[tuple[str, str]], size: int) -> Iterator[Shard]:
    """Shards of `size` rows, the last one shorter."""
    rows, number = iter(rows), 0
    while chunk := list(islice(rows, size)):
        yield Shard(number, [row_id for row_id, _ in chunk], [text for _, text in chunk])
        number += 1
