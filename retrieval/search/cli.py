"""The commands that index a corpus and that search one. Loads without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lodestar.cli import Parser, entry_point
from lodestar.data.readers import count_rows
from lodestar.distributed.runtime import Placement, choose_device
from lodestar.errors import ConfigError, DataError, LaunchError, LodestarError, shown
from lodestar.imports import quick_imports
from lodestar.planning.plan import PlanWarnings, in_words
from retrieval.embedding.cache import search_cache_file
from retrieval.embedding.model_folder import check_folder, fingerprint
from retrieval.evaluation.beir import Document, read_corpus
from retrieval.search.config import IndexRecipe
from retrieval.search.corpus import check_where, corpus_of_run, find_corpus
from retrieval.search.index import check_model, index, work_folder
from retrieval.search.store_record import check_record, find_table, read_record

if TYPE_CHECKING:
    from retrieval.search.search import Hit, Searcher, StoreSearcher

SNIPPET_CHARACTERS = 240


# --- indexing --------------------------------------------------------------------------------


def index_main(argv: Sequence[str] | None = None) -> int:
    return entry_point(
        argv, usage="Put a corpus into a vector database.", schema=IndexRecipe, plan=index_plan, run=index_run
    )


def index_plan(recipe: IndexRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    missing = PlanWarnings()
    rows = missing.or_default(None, lambda: count_rows(find_corpus(recipe.corpus)), "rows are not known")
    record = missing.or_default(None, lambda: read_record(recipe.store), "a new table is assumed")
    missing.or_default(None, lambda: check_model(recipe), "nothing can be embedded")
    if record is not None:
        check_record(recipe.store, record, recipe.model, fingerprint(recipe.model, recipe.prompts))
    return {
        "world_size": world_size,
        "model": recipe.model,
        "corpus": recipe.corpus,
        "rows": rows,
        "chunks": None if rows is None else -(-rows // recipe.encode.shard_rows),
        "store": f"{recipe.store.kind}, {recipe.store.place}, {recipe.store.table}",
        "work": str(work_folder(recipe)),
        "state": "exists: rows with an existing id are overwritten" if record else "new",
        "missing": missing.lines,
    }


def index_run(recipe: IndexRecipe, placement: Placement) -> int:
    if placement.world_size > 1:
        raise LaunchError(
            "launcher: one process writes to a database (start with python; encode.devices takes several)"
        )
    summary = index(recipe, progress=sys.stderr.isatty())
    print(
        f"{summary.documents:,} documents in {recipe.store.kind}, {recipe.store.place}, {recipe.store.table} "
        f"({summary.rows:,} rows embedded, {summary.truncated:,} texts truncated)"
    )
    return 0


# --- searching -------------------------------------------------------------------------------


def search_main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse_search(argv)
        if options.plan:
            plan = search_plan(options)
            print(json.dumps(plan) if options.json else in_words(plan))
            return 0
        with _open_searcher(options) as searcher:
            for query in options.query or _read_queries():
                _print_hits(query, searcher.search(query, options.top))
        return 0
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def parse_search(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("Search a corpus with a trained model.")
    parser.add_argument("query", nargs="*", help="the query, in quotes; none: read queries from the terminal")
    parser.add_argument("--model", metavar="FOLDER", help="as model/ of a run; with --store: where it is now, if moved")
    parser.add_argument(
        "--corpus", metavar="PATH", help="a corpus.jsonl or BEIR folder; none: the one that the run's summary names"
    )
    parser.add_argument("--store", metavar="PATH", help="a folder that lodestar index filled, or its recipe")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="with --store: only such documents; repeatable",
    )
    parser.add_argument("--device", metavar="NAME", help="as cuda:1 or cpu; none: the first GPU, or the CPU")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many documents to show (5)")
    parser.add_argument("--plan", action="store_true", help="say what would be searched and by what model, and exit")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    options = parser.parse_intermixed_args(argv)
    if not 0 < options.top <= 10_000:
        raise ConfigError(f"command line: --top: must be from 1 to 10,000, got {shown(options.top)} (correct it)")
    if options.json and not options.plan:
        raise ConfigError("command line: --json: only with --plan (add that, or leave it out)")
    if not options.model and not options.store:
        raise ConfigError("command line: the following arguments are required: --model, or --store (see --help)")
    if options.store and options.corpus:
        raise ConfigError("command line: --corpus: not with --store, which has a corpus (give the one or the other)")
    if options.where and not options.store:
        raise ConfigError("command line: --where: only with --store (lodestar index creates one)")
    return options


def search_plan(options: argparse.Namespace) -> dict[str, object]:
    if options.store:
        store, record, model, precision = find_table(options.store, options.model)
        return {
            "model": model,
            "store": store.place,
            "kind": store.kind,
            "table": store.table,
            "dimension": record.dimension,
            "precision": precision,
        }
    corpus = _read_corpus(options)
    cache = corpus.cache
    return {
        "model": str(corpus.model_folder),
        "corpus": corpus.path,
        "documents": len(corpus.documents),
        "embeddings": f"{'cached' if cache.is_file() else 'to be computed, then cached'} in {cache}",
    }


def _open_searcher(options: argparse.Namespace) -> AbstractContextManager[Searcher | StoreSearcher]:
    """All mistakes in the options are told before torch is loaded."""
    if options.store:
        where = _parse_where(options.where)
        table = find_table(options.store, options.model)
        with quick_imports():
            from retrieval.search.search import table_searcher
        return table_searcher(table, where, _choose_device(options))
    corpus = _read_corpus(options)
    with quick_imports():
        from retrieval.embedding.load_model import load_model
        from retrieval.search.search import Searcher
    cache = corpus.cache  # by the files as they are before the model is loaded
    model = load_model(corpus.model_folder, _choose_device(options))
    return nullcontext(Searcher(model, corpus.documents, cache=cache, progress=sys.stderr.isatty()))


def _choose_device(options: argparse.Namespace) -> str:
    if options.device is None:
        return str(choose_device(0))
    with quick_imports():
        from retrieval.embedding.embedder import check_devices
    check_devices([options.device], "command line: --device")
    return options.device


def _parse_where(options: Sequence[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise ConfigError(f"command line: --where: {option}: not FIELD=VALUE (as lang=en)")
    parts = [option.partition("=") for option in options]
    return check_where({field: value for field, _, value in parts}, "command line: --where")


class _Corpus(NamedTuple):
    model_folder: Path
    path: str
    documents: list[Document]

    @property
    def cache(self) -> Path:
        """Of the documents' embeddings."""
        texts = (document.full for document in self.documents)
        return search_cache_file(self.model_folder, fingerprint(str(self.model_folder)), texts)


def _read_corpus(options: argparse.Namespace) -> _Corpus:
    folder = Path(options.model)
    if not folder.is_dir():
        raise ConfigError(f"command line: --model: {folder}: no such folder (name model/ of a run)")
    check_folder(folder, "command line: --model")
    path = options.corpus or corpus_of_run(folder)
    documents = list(read_corpus(path))
    if not documents:
        raise DataError(f"{path}: holds no document (one object on each line, with _id and text)")
    return _Corpus(folder, path, documents)


def _read_queries() -> Iterator[str]:
    """The lines of standard input that are not empty; with a prompt on a terminal."""
    if sys.stdin.isatty():
        print("Type a query and press Enter; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _print_hits(query: str, hits: Sequence[Hit]) -> None:
    """Score, id, title and the beginning of the text of each hit."""
    console = Console(highlight=False)
    console.print(Text(query, style="bold"))
    if not hits:
        console.print("     nothing found")
    for rank, hit in enumerate(hits, 1):
        line = Text.assemble(f"{rank:>3}  {hit.score:.3f}  ", (hit.document.id, "cyan"), f"  {hit.document.title}")
        console.print(line, soft_wrap=True)
        text = " ".join(hit.document.text.split())
        snippet = text if len(text) <= SNIPPET_CHARACTERS else text[:SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " ..."
        console.print(Padding(Text(snippet, style="dim"), (0, 0, 0, 12)))
    console.print()
