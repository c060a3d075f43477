"""Retrieval-augmented generation: a question goes to an LLM behind the documents that answer it.

python examples/rag.py --model runs/demo/finetune/model --corpus corpus.jsonl "How are the rows of a tensor shuffled?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lodestar.errors import LodestarError
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.index import index
from retrieval.search.search import Hit, StoreSearcher, open_searcher

PROMPT = """Answer the question from the documents alone, and name those that you used, as [1].
If they do not hold the answer, say so.

{documents}

Question: {question}
Answer:"""


def build_prompt(question: str, hits: list[Hit]) -> str:
    documents = "\n\n".join(f"[{rank}] {hit.document.full}" for rank, hit in enumerate(hits, 1))
    return PROMPT.format(documents=documents, question=question)


def show(prompt: str) -> str:
    """In an LLM's place."""
    print(prompt)
    return ""


def rag(question: str, searcher: StoreSearcher, answer: Callable[[str], str] = show, k: int = 3) -> str:
    """What `answer` makes of the question behind the k nearest documents."""
    return answer(build_prompt(question, searcher.search(question, k)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the prompt of a retrieval-augmented answer.")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="as model/ of a run")
    parser.add_argument("--corpus", required=True, metavar="PATH", help="a BEIR folder, or files of rows")
    parser.add_argument("--store", metavar="FOLDER", help="where the LanceDB table goes (runs/rag/CORPUS)")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="documents in the prompt (3)")
    options = parser.parse_args(argv)
    try:
        folder = options.store or f"runs/rag/{Path(options.corpus).resolve().name}"
        store = StoreConfig(kind="lancedb", path=folder)
        index(IndexRecipe(model=options.model, corpus=options.corpus, store=store), progress=sys.stderr.isatty())
        with open_searcher(folder) as searcher:
            rag(options.question, searcher, k=options.top)
        return 0
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
