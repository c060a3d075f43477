"""What was measured: rows of models, tables of them, and one JSON.

Shape suffixes: I items of a test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar import files
from retrieval.evaluation.significance import Bootstrap, paired_bootstrap
from retrieval.evaluation.tasks import COLUMNS, TaskResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = dict[str, Any]
"""`model`, a label, and the metrics."""


@dataclass
class Result:
    """Of one task."""

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    """A row for each model, in order, with all metrics."""
    items: dict[str, NDArray[Any]] = field(default_factory=dict)
    """(I,) for each model, where the task's first metric is a mean over items."""

    def add(self, label: str, found: TaskResult) -> None:
        self.rows.append({"model": label, **found.metrics})
        if found.item_I is not None:
            self.items[label] = found.item_I

    @property
    def columns(self) -> dict[str, str]:
        return COLUMNS[self.facts["kind"]]

    def differences(self, first: str, how: Bootstrap) -> list[Row]:
        """Each other row's difference to `first` in the first metric."""
        if not how.resamples:
            return []
        metric = next(iter(self.columns))
        return [
            {
                "model": label,
                "to": first,
                "metric": metric,
                **paired_bootstrap(self.items[first], item_I, **how.model_dump()),
            }
            for label, item_I in self.items.items()
            if label != first
        ]


def show(rows: Sequence[Row], title: str, columns: Mapping[str, str] = COLUMNS["retrieval"]) -> None:
    """A row for each model, a column for each metric, the best of it in bold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    best = {key: max(row[key] for row in rows) for key in columns}
    for row in rows:
        cells = [Text(f"{row[key]:.4f}", style="bold" if row[key] == best[key] else "") for key in columns]
        table.add_row(Text(row["model"]), *cells)
    Console().print(table)


def show_all(results: Mapping[str, Result]) -> None:
    """Of one task `show`; of several a row for each task and metric, a column for each model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if len(results) == 1:
        ((name, result),) = results.items()
        split = f", {result.facts['split']}" if "split" in result.facts else ""
        return show(result.rows, f"{name}{split}: {counts(result.facts)}", result.columns)
    models = dict.fromkeys(row["model"] for result in results.values() for row in result.rows)
    table = Table("task", "metric", title=f"{len(results)} tasks")
    for model in models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name, result in results.items():
        for key, heading in result.columns.items():
            values = {row["model"]: row[key] for row in result.rows}
            best = max(values.values())
            cells = {m: Text(f"{value:.4f}", style="bold" if value == best else "") for m, value in values.items()}
            table.add_row(Text(name), heading, *(cells.get(model, "") for model in models))
    Console().print(table)


def show_differences(differences: Mapping[str, Sequence[Row]], how: Bootstrap) -> None:
    """A row for each task and model; nothing where there is nothing to compare."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not any(differences.values()):
        return
    first = next(each["to"] for found in differences.values() for each in found)
    table = Table(title=f"difference to {first}, paired bootstrap of {how.resamples:,} resamples")
    for heading in ("task", "model", "difference", "95 % interval", "p"):
        table.add_column(heading, overflow="fold", no_wrap="%" in heading)
    for name, found in differences.items():
        for each in found:
            interval = f"{each['low']:+.4f} .. {each['high']:+.4f}"
            cells = (
                f"{name}: {each['metric']}",
                each["model"],
                f"{each['difference']:+.4f}",
                interval,
                f"{each['p']:.4f}",
            )
            table.add_row(*map(Text, cells))
    Console().print(table)


def about(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"evaluation": name, **{key: value for key, value in facts.items() if key != "kind"}}


def write_json(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """`evaluation.json` in the folder; a reader sees the old one or the new one."""
    path = Path(folder) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    return path


def counts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in facts.items() if isinstance(count, int))
