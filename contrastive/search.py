"""Questions to a trained model: a corpus embedded once, or in a vector database; the nearest documents printed.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chassis.cli import Parser
from chassis.errors import ConfigError, DataError, LodestarError
from contrastive.embedder import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from chassis.retrieval import Document
    from contrastive.embedder import Embedder
    from contrastive.stores import Store

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
        from contrastive.evaluate import embed

        self.model, self.documents = model, list(documents)
        stored = _read(cache, len(self.documents))
        if stored is None:
            texts = [document.full for document in self.documents]
            stored = embed(model, texts, "document", batch_tokens=batch_tokens, progress=progress)
            _write(cache, stored)
        self.document_ND = stored

    def ask(self, query: str, k: int = 5) -> list[Hit]:
        """The k nearest documents, best first."""
        from chassis.retrieval import search
        from contrastive.evaluate import embed

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
        from chassis.retrieval import Document

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
    from contrastive.stores import check, locate, open_store, read_record, record_path

    precision = "fp32"
    if str(name).endswith((".yaml", ".yml")):
        from chassis.config import load
        from contrastive.index import IndexRecipe

        recipe = load(IndexRecipe, name)
        section, precision, record = recipe.store, recipe.encode.precision, read_record(record_path(recipe.store))
        model = model or recipe.model
        if record is None:
            raise ConfigError(f"{record_path(section)}: no such index (launch/index.py --config {name} makes it)")
    else:
        section, record = locate(name)
        model = model or record.model
    check(section, model)

    from chassis.runtime import choose_device
    from contrastive.embedder import Embedder

    embedder = Embedder(model, [str(choose_device(0))], precision=precision, width=record.dimension)
    return StoreSearcher(embedder, open_store(section, model, record.dimension), where)


def cache_file(model_folder: Path, documents: Iterable[Document]) -> Path:
    """`search_cache/KEY.safetensors` beside the model; the key changes with the model's files and the documents."""
    digest = hashlib.blake2b(fingerprint(str(model_folder)).encode(), digest_size=12)
    for document in documents:
        digest.update(json.dumps([document.id, document.full]).encode())
    return model_folder.resolve().parent / "search_cache" / f"{digest.hexdigest()}.safetensors"


def _read(cache: Path | None, documents: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if cache is None or not cache.is_file():
        return None
    try:
        stored = load_file(cache)["documents"]
    except (SafetensorError, KeyError):
        return None  # damaged: embed again, and write it anew
    return stored if len(stored) == documents else None


def _write(cache: Path | None, document_ND: Tensor) -> None:
    from safetensors.torch import save_file

    if cache is None:
        return
    draft = cache.with_name(f".{cache.name}.{os.getpid()}.draft")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"documents": document_ND.contiguous()}, draft)
        draft.replace(cache)
    except OSError as error:
        print(f"warning: {cache}: cannot be written, so the next start embeds again: {error}", file=sys.stderr)


# --- the door --------------------------------------------------------------------------------


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
    from contrastive.index import FIELD

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
    folder = Path(options.model)
    if not folder.is_dir():
        raise ConfigError(f"command line: --model: {folder}: no such folder (name model/ of a run)")
    corpus = options.corpus or default_corpus(folder)

    from chassis.retrieval import read_corpus
    from chassis.runtime import choose_device
    from contrastive.embedder import load_model

    documents = list(read_corpus(corpus))
    if not documents:
        raise DataError(f"{corpus}: holds no document (one object on each line, with _id and text)")
    model = load_model(folder, choose_device(0))
    return Searcher(model, documents, cache=cache_file(folder, documents), progress=sys.stderr.isatty())


def _typed() -> Iterable[str]:
    """Lines of the standard input, without empty ones; a prompt where someone types them."""
    if sys.stdin.isatty():
        print("Type a query and press Enter; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
