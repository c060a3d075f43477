"""Questions to a trained model: a corpus embedded once, or in a vector database; the nearest documents printed.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.cli import Parser
from lodestar.errors import ConfigError, DataError, LodestarError
from lodestar.planning.plan import in_words
from retrieval.embedding.cache import cache_path as file_for
from retrieval.embedding.cache import load_or_compute as cached
from retrieval.embedding.model_folder import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from retrieval.embedding.config import Precision
    from retrieval.embedding.embedder import Embedder
    from retrieval.evaluation.beir import Document
    from retrieval.search.vector_stores import Record, Store, StoreSection

SNIPPET_CHARACTERS = 240


@dataclass(frozen=True)
class Hit:
    score: float
    """Cosine of query and document, where the model normalises."""
    document: Document


class Searcher:
    """A model and the embeddings of its documents, from `cache` where the same ones are there already."""

    def __init__(
        self,
        model: SentenceTransformer,
        documents: Iterable[Document],
        *,
        cache: Path | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        """cache   a safetensors file of (N, D) fp32, named by `cache_file`; written if it is not there"""
        from retrieval.embedding.distributed_embed import embed

        self.model, self.documents = model, list(documents)
        texts = [document.full for document in self.documents]
        self.document_ND = cached(
            cache,
            len(texts),
            lambda: embed(model, texts, "document", batch_tokens=batch_tokens, progress=progress),
        )

    def ask(self, query: str, k: int = 5) -> list[Hit]:
        """The k nearest documents, best first."""
        from retrieval.embedding.distributed_embed import embed
        from retrieval.embedding.exact_search import search

        scores, found = search(embed(self.model, [query], "query"), self.document_ND, k)
        hits = zip(scores[0].tolist(), found[0].tolist(), strict=True)
        return [Hit(score, self.documents[row]) for score, row in hits]


class StoreSearcher:
    """A vector database and the model that its documents were embedded by; also a context manager."""

    def __init__(self, embedder: Embedder, store: Store, where: Mapping[str, str] | None = None) -> None:
        """where   only documents with these values, as {"lang": "en"}"""
        self.embedder, self.store, self.where = embedder, store, where or {}

    def ask(self, query: str, k: int = 5) -> list[Hit]:
        """The k nearest documents, best first."""
        from retrieval.evaluation.beir import Document

        found = self.store.search(self.embedder.encode_queries([query])[0], k, self.where)
        return [Hit(score, Document(row["id"], row["title"], row["text"])) for score, row in found]

    def __enter__(self) -> StoreSearcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()


def open_searcher(
    name: str | Path, *, model: str | None = None, where: Mapping[str, str] | None = None
) -> StoreSearcher:
    """name    the folder that launch/index.py filled, or its recipe
    model   where the model is now, if it was moved
    Raises ConfigError, also where the model is not the one that embedded the documents.
    """
    from lodestar.distributed.runtime import choose_device
    from retrieval.embedding.embedder import Embedder
    from retrieval.search.vector_stores import open_store

    section, record, model, precision = _locate(name, model)
    embedder = Embedder(
        model, [str(choose_device(0))], precision=precision, width=record.dimension, prompts=record.prompts
    )
    return StoreSearcher(embedder, open_store(section, model, record.dimension, record.prompts), where)


def _locate(name: str | Path, model: str | None) -> tuple[StoreSection, Record, str, Precision]:
    """The table, what is known of it, the model that may be asked, and how it computes."""
    from retrieval.search.vector_stores import check, locate, read_record, record_path

    precision: Precision = "fp32"
    if str(name).endswith((".yaml", ".yml")):
        from lodestar.config.loader import load
        from retrieval.search.index import IndexRecipe

        recipe = load(IndexRecipe, name)
        section, precision, record = recipe.store, recipe.encode.precision, read_record(record_path(recipe.store))
        model = model or recipe.model
        if record is None:
            raise ConfigError(f"{record_path(section)}: no such index (launch/index.py --config {name} makes it)")
    else:
        section, record = locate(name)
        model = model or record.model
    check(section, model, prompts=record.prompts)
    return section, record, model, precision


def cache_file(model_folder: Path, documents: Iterable[Document]) -> Path:
    """`search_cache/KEY.safetensors` beside the model; the key changes with the model's files and the documents."""
    folder, texts = model_folder.resolve().parent / "search_cache", ([each.id, each.full] for each in documents)
    return file_for(folder, fingerprint(str(model_folder)), texts=texts)


# --- the command -----------------------------------------------------------------------------


def default_corpus(model_folder: Path) -> str:
    """What the run that trained the model wrote down as `search_corpus` in its summary.json."""
    summary = model_folder.resolve().parent / "summary.json"
    try:
        found = json.loads(summary.read_text(encoding="utf-8")).get("search_corpus")
    except (OSError, ValueError, AttributeError):
        found = None
    if not isinstance(found, str):
        raise ConfigError(f"{summary}: search_corpus: not there (give --corpus a corpus.jsonl or a BEIR folder)")
    return found


def show(query: str, hits: Sequence[Hit]) -> None:
    """Score, id, title and the beginning of the text of each hit."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(query, style="bold"))
    if not hits:
        console.print("     nothing found")
    for rank, hit in enumerate(hits, 1):
        line = Text.assemble(f"{rank:>3}  {hit.score:.3f}  ", (hit.document.id, "cyan"), f"  {hit.document.title}")
        console.print(line, soft_wrap=True)
        snippet = " ".join(hit.document.text.split())
        cut = snippet if len(snippet) <= SNIPPET_CHARACTERS else snippet[:SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " ..."
        console.print(Padding(Text(cut, style="dim"), (0, 0, 0, 12)))
    console.print()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parse(argv)
        if options.plan:
            found = _plan(options)
            print(json.dumps(found) if options.json else in_words(found))
            return 0
        with _open(options) as searcher:
            for query in options.query or _typed():
                show(query, searcher.ask(query, options.top))
        return 0
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Search a corpus with a trained model.", allow_abbrev=False)
    parser.add_argument("query", nargs="*", help="what to look for, in quotes; none: read lines from the terminal")
    parser.add_argument("--model", metavar="FOLDER", help="as model/ of a run; with --store: where it is now, if moved")
    parser.add_argument("--corpus", metavar="PATH", help="a corpus.jsonl or BEIR folder; none: what the run wrote down")
    parser.add_argument("--store", metavar="PATH", help="a folder that launch/index.py filled, or its recipe")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="with --store: only such documents; repeatable",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many documents to show (5)")
    parser.add_argument("--plan", action="store_true", help="say what would be searched and by what model, and exit")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    options = parser.parse_intermixed_args(argv)
    if options.top < 1:
        raise ConfigError(f"command line: --top: must be 1 or more, got {options.top}")
    if not options.model and not options.store:
        raise ConfigError("command line: the following arguments are required: --model, or --store (see --help)")
    if options.store and options.corpus:
        raise ConfigError("command line: --corpus: not with --store, which has a corpus (give the one or the other)")
    if options.where and not options.store:
        raise ConfigError("command line: --where: only with --store (launch/index.py makes one)")
    return options


def _where(options: Sequence[str]) -> dict[str, str]:
    from retrieval.search.index import FIELD

    parts = [option.partition("=") for option in options]
    for field, equals, value in parts:
        if not equals or not FIELD.fullmatch(field):
            raise ConfigError(f"command line: --where: {field}{equals}{value}: not FIELD=VALUE (as lang=en)")
    return {field: value for field, _, value in parts}


def _open(options: argparse.Namespace) -> AbstractContextManager[Searcher | StoreSearcher]:
    if options.store:
        return open_searcher(options.store, model=options.model, where=_where(options.where))
    return nullcontext(_open_corpus(options))


def _open_corpus(options: argparse.Namespace) -> Searcher:
    from lodestar.distributed.runtime import choose_device
    from retrieval.embedding.load_model import load_model

    folder, _, documents = _read_corpus(options)
    model = load_model(folder, choose_device(0))
    return Searcher(model, documents, cache=cache_file(folder, documents), progress=sys.stderr.isatty())


def _read_corpus(options: argparse.Namespace) -> tuple[Path, str, list[Document]]:
    """The model's folder, where its corpus is, and that."""
    from retrieval.embedding.model_folder import check_folder
    from retrieval.evaluation.beir import read_corpus

    folder = Path(options.model)
    if not folder.is_dir():
        raise ConfigError(f"command line: --model: {folder}: no such folder (name model/ of a run)")
    check_folder(folder)
    corpus = options.corpus or default_corpus(folder)
    documents = list(read_corpus(corpus))
    if not documents:
        raise DataError(f"{corpus}: holds no document (one object on each line, with _id and text)")
    return folder, corpus, documents


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    if options.store:
        section, record, model, precision = _locate(options.store, options.model)
        facts = {"store": section.path, "kind": section.kind, "table": section.table, "dimension": record.dimension}
        return {"model": model, **facts, "precision": precision}
    folder, corpus, documents = _read_corpus(options)
    cache = cache_file(folder, documents)
    facts = {"model": str(folder), "corpus": corpus, "documents": len(documents)}
    return {**facts, "embeddings": f"{'kept' if cache.is_file() else 'to be made, then kept'} in {cache}"}


def _typed() -> Iterable[str]:
    """Lines of the standard input, without empty ones; a prompt where someone types them."""
    if sys.stdin.isatty():
        print("Type a query and press Enter; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
