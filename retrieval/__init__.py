"""What a trained model is used for: embedding, evaluation, mining, search, export.

The functions and classes for scripts and notebooks stand here, and are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval.embedding.embedder import Embedder
    from retrieval.evaluation.cli import evaluate
    from retrieval.mining.cli import mine
    from retrieval.search.index import index
    from retrieval.search.search import Searcher, open_searcher

__all__ = ["Embedder", "Searcher", "evaluate", "index", "mine", "open_searcher"]

_MODULES = {
    "Embedder": "retrieval.embedding.embedder",
    "Searcher": "retrieval.search.search",
    "evaluate": "retrieval.evaluation.cli",
    "index": "retrieval.search.index",
    "mine": "retrieval.mining.cli",
    "open_searcher": "retrieval.search.search",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
