"""The checks of the recipes that do not train: every file that they name is read whole. Loads without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial

from retrieval.check.training import CheckReport
from retrieval.embedding.config import EncodeRecipe
from retrieval.embedding.corpus import read_texts
from retrieval.embedding.model_folder import check_folder
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.tasks import read_task
from retrieval.mining.config import MineRecipe
from retrieval.mining.texts import check_files, read_examples
from retrieval.search.config import IndexRecipe
from retrieval.search.corpus import find_corpus, read_chunks

_CHUNK = 1000


def check_evaluate(recipe: EvaluateRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    for path in recipe.labelled_models.values():
        report.attempt(partial(check_folder, path))
    for name, config in recipe.all_tasks.items():
        if (task := report.attempt(partial(read_task, config, name))) is not None:
            report.facts[f"task {name}"] = f"{task.kind}: {task.counts_in_words}"
    return report


def check_encode(recipe: EncodeRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    report.attempt(partial(check_folder, recipe.model))
    report.facts["rows"] = report.attempt(lambda: _count(read_texts(recipe)))
    return report


def check_index(recipe: IndexRecipe, world_size: int) -> CheckReport:
    report = CheckReport()
    report.attempt(partial(check_folder, recipe.model))
    report.facts["chunks"] = report.attempt(lambda: _count(read_chunks(find_corpus(recipe.corpus), _CHUNK)))
    return report


def check_mine(recipe: MineRecipe, world_size: int) -> CheckReport:
    report, corpus = CheckReport(), recipe.corpus_recipe
    report.attempt(partial(check_folder, recipe.model))
    report.attempt(partial(check_files, recipe))
    report.facts["queries"] = report.attempt(lambda: _count(read_examples(recipe)))
    if corpus is not None:
        report.facts["corpus_rows"] = report.attempt(lambda: _count(read_texts(corpus)))
    return report


def _count(items: Iterable[object]) -> int:
    """Read to the end."""
    last = deque(enumerate(items, 1), maxlen=1)
    return last[0][0] if last else 0
