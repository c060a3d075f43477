"""Results of an evaluation: rows of models, tables in the terminal, and one JSON file.

Shape suffixes: I items of a test set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lodestar import files
from retrieval.evaluation.config import BootstrapConfig
from retrieval.evaluation.report import Row, View
from retrieval.evaluation.significance import BootstrapResult, paired_bootstrap
from retrieval.evaluation.tasks import RETRIEVAL_COLUMNS, Task, TaskResult


class Difference(BootstrapResult):
    """Of one model to another in the first metric of a task."""

    model: str
    to: str
    metric: str


@dataclass
class Result:
    """What models reach on one task."""

    task: Task
    rows: list[Row] = field(default_factory=list)
    """A row for each model, in order, with all metrics."""
    items: dict[str, np.ndarray] = field(default_factory=dict)
    """(I,) for each model, if the task's first metric is a mean over items."""
    views: list[View] = field(default_factory=list)
    """What the report shows of each model, if there is to be one."""

    def add(self, label: str, result: TaskResult) -> None:
        self.rows.append({"model": label, **result.metrics})
        if result.item_I is not None:
            self.items[label] = result.item_I

    def differences(self, baselines: Sequence[str], config: BootstrapConfig) -> list[Difference]:
        """Each other row's difference to each baseline in the first metric."""
        if not config.resamples:
            return []
        metric = next(iter(self.task.columns))
        return [
            {
                "model": label,
                "to": baseline,
                "metric": metric,
                **paired_bootstrap(self.items[baseline], item_I, resamples=config.resamples, seed=config.seed),
            }
            for baseline in baselines
            if baseline in self.items  # BM25 has a row in retrieval alone
            for label, item_I in self.items.items()
            if label != baseline
        ]


def show(rows: Sequence[Row], title: str, columns: Mapping[str, str] = RETRIEVAL_COLUMNS) -> None:
    """Print a row for each model and a column for each metric, the best value of it in bold."""
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    cells_of_columns = [_cells(float(row[metric]) for row in rows) for metric in columns]
    for row, *cells in zip(rows, *cells_of_columns, strict=True):
        table.add_row(Text(str(row["model"])), *cells)
    Console().print(table)


def show_all(results: Mapping[str, Result]) -> None:
    """Print `show` for a single task; for several a row for each task and metric, a column for each model."""
    if len(results) == 1:
        ((name, result),) = results.items()
        split = f", {result.task.split}" if result.task.split else ""
        return show(result.rows, f"{name}{split}: {result.task.counts_in_words}", result.task.columns)
    models = dict.fromkeys(str(row["model"]) for result in results.values() for row in result.rows)
    table = Table("task", "metric", title=f"{len(results)} tasks")
    for model in models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name, result in results.items():
        for metric, heading in result.task.columns.items():
            values = {row["model"]: float(row[metric]) for row in result.rows}
            cells = dict(zip(values, _cells(values.values()), strict=True))
            table.add_row(Text(name), heading, *(cells.get(model, "") for model in models))
    Console().print(table)


def _cells(values: Iterable[float]) -> list[Text]:
    """The values as text, the best in bold."""
    values = list(values)
    return [Text(f"{value:.4f}", style="bold" if value == max(values) else "") for value in values]


def show_differences(differences: Mapping[str, Sequence[Difference]], config: BootstrapConfig) -> None:
    """Print a row for each task and model; nothing if there is nothing to compare."""
    if not any(differences.values()):
        return
    several = len(differences) > 1
    table = Table(title=f"differences, paired bootstrap with {config.resamples:,} resamples")
    for heading in (*["task"] * several, "model", "compared with", "difference", "95 % interval", "p"):
        table.add_column(heading, overflow="fold", no_wrap="%" in heading)
    for name, of_task in differences.items():
        for difference in of_task:
            cells = (
                *[f"{name}: {difference['metric']}"] * several,
                difference["model"],
                difference["to"],
                f"{difference['difference']:+.4f}",
                f"{difference['low']:+.4f} .. {difference['high']:+.4f}",
                f"{difference['p']:.4f}",
            )
            table.add_row(*map(Text, cells))
    Console().print(table)


def write_json(folder: str | Path, content: Mapping[str, object]) -> Path:
    """Write `evaluation.json` into the folder, whole or not at all."""
    path = Path(folder) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    return path
