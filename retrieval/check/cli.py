"""`lodestar check`: everything that a recipe names, read before a run. Loads without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from markupsafe import escape
from pydantic import BaseModel

from lodestar.cli import Parser
from lodestar.commands import COMMANDS, load
from lodestar.config import loader
from lodestar.config.explain import located
from lodestar.distributed.runtime import quiet_libraries
from lodestar.errors import ConfigError, LodestarError
from lodestar.recipes_cli import SCHEMA_LINE
from lodestar.reporting import html
from retrieval.check.training import CheckReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHECKS = {
    "finetune": "contrastive.check:check",
    "pretrain": "retromae.check:check",
    "mine": "retrieval.check.other:check_mine",
    "evaluate": "retrieval.check.other:check_evaluate",
    "encode": "retrieval.check.other:check_encode",
    "index": "retrieval.check.other:check_index",
    "export": "retrieval.check.other:check_export",
    "merge": "retrieval.check.other:check_merge",
}
"""Command -> the check of its recipe: (recipe, world size) -> report. The first that fits a recipe is taken."""
_BINS = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Print all findings; the exit code is 0 without errors, else 2."""
    try:
        quiet_libraries()
        parser = Parser("Read everything that a recipe names, list all mistakes, and describe the data.")
        parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys, as optim.lr=1e-5")
        parser.add_argument("--command", choices=list(CHECKS), help="whose recipe it is; none: found by its keys")
        parser.add_argument("--html", metavar="FILE", help="also write the findings, with a figure of the lengths")
        parser.add_argument("--json", action="store_true", help="print the statistics as one JSON object")
        options = parser.parse_intermixed_args(argv)
        command = options.command or _command_of(Path(options.config))
        schema = cast(type[BaseModel], load(COMMANDS[command].recipe))
        tree = loader.read(options.config, options.overrides)
        check = cast(Callable[[BaseModel, int], CheckReport], load(CHECKS[command]))
        report = check(loader.validate(schema, tree), 1)
        report.errors[:] = [located(schema, tree, line) for line in report.errors]
        report.warnings[:] = [
            f"warning: {located(schema, tree, line.removeprefix('warning: '))}" for line in report.warnings
        ]
        if options.html:
            write_html(report, Path(options.html), f"{command}: {options.config}")
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    _print(report, as_json=options.json)
    return 2 if report.errors else 0


def _command_of(path: Path) -> str:
    """The command whose recipe a file is: by its schema line, else the one that knows most of its keys."""
    values = loader.read_values(path)
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    if first.startswith(SCHEMA_LINE) and (name := Path(first.removeprefix(SCHEMA_LINE)).stem) in COMMANDS:
        if name not in CHECKS:
            raise ConfigError(f"{path}:1: {name}: its recipes have no check (lodestar {name} --plan reads its files)")
        return name
    unknown = {name: _num_unknown(values, load(COMMANDS[name].recipe)) for name in CHECKS}
    return min(unknown, key=lambda name: unknown[name])


def _num_unknown(values: Mapping[str, Any], schema: object) -> int:
    """Keys of a recipe and of its sections that a schema does not have, and required ones that are absent."""
    fields = cast(type[BaseModel], schema).model_fields
    count = sum(field.is_required() and name not in values for name, field in fields.items())
    for name, value in values.items():
        section = fields[name].annotation if name in fields else None
        if name not in fields:
            count += 1
        elif isinstance(value, dict) and isinstance(section, type) and issubclass(section, BaseModel):
            count += _num_unknown(cast(dict[str, Any], value), section)
    return count


def _print(report: CheckReport, *, as_json: bool) -> None:
    for line in report.errors:
        print(f"error: {line}", file=sys.stderr)
    for line in report.warnings:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    if as_json:
        print(json.dumps({**report.facts, "errors": report.errors, "warnings": report.warnings}))
        return
    for name, value in _in_words(report.facts).items():
        print(f"{name:<34} {value}")
    print(f"{len(report.errors):,} errors, {len(report.warnings):,} warnings")


def _in_words(facts: Mapping[str, object]) -> dict[str, str]:
    words: dict[str, str] = {}
    for name, value in facts.items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{cast(int, value) / 2**30:.2f} GiB"
        elif isinstance(value, float):
            value = f"{value:.2%}"
        words[name.replace("_", " ")] = html.number(value)
    return words


def write_html(report: CheckReport, path: Path, title: str) -> Path:
    """Findings, statistics and a figure of the lengths in one file; ConfigError where it cannot be written."""
    lines = [[f"error: {line}"] for line in report.errors] + [[line] for line in report.warnings]
    parts = [f"<h1>{escape(title)}</h1>", html.table(list(map(list, _in_words(report.facts).items())))]
    if any(map(len, report.lengths.values())):
        roles = [role for role, lengths_N in report.lengths.items() if len(lengths_N)]
        caption = f"Texts by their number of {report.unit}; the longest 1 % are in the last bar."
        figure = html.figure("Lengths", lambda axes: _draw(axes, report), key=roles, caption=caption)
        parts.append(figure)
    parts += ["<h2>Findings</h2>", html.table(lines) if lines else "<p>None.</p>"]
    try:
        return html.page(path, title, map(str, parts))
    except OSError as error:
        raise ConfigError(f"command line: --html: {path}: {error.strerror} (name another file)") from None


def _draw(axes: Axes, report: CheckReport) -> list[html.Mark]:
    lengths = {role: lengths_N for role, lengths_N in report.lengths.items() if len(lengths_N)}
    limit = max(int(np.percentile(np.concatenate(list(lengths.values())), 99)), 1)
    edges = np.linspace(0, limit, min(_BINS, limit) + 1)
    marks: dict[int, list[str]] = {}
    for i, (role, lengths_N) in enumerate(lengths.items()):
        counts = np.histogram(np.minimum(lengths_N, limit), edges)[0]
        axes.stairs(counts, edges, color=html.SERIES[i % len(html.SERIES)])
        for k, count in enumerate(counts.tolist()):
            marks.setdefault(k, []).append(f"{role}: {count:,}")
    axes.set_xlabel(report.unit)
    return [
        html.Mark(edges[k], edges[k + 1], f"{edges[k]:.0f} to {edges[k + 1]:.0f}: {', '.join(texts)}")
        for k, texts in marks.items()
    ]
