"""report.html: the curves and numbers of a run in one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from lodestar.reporting.html import Html, Mark, escape, facts, figure, number, page, table
from lodestar.reporting.trackers import METRICS, read_metrics

Line = Mapping[str, Any]
_POINTS = 400
"""Of a curve, at most: a run of any length gives a file of the same size."""
_STRETCHES = 60
"""Of the x axis, that tell their numbers to the mouse."""


class Chart(NamedTuple):
    title: str
    fields: tuple[str, ...]
    """Of metrics.jsonl; may hold wildcards."""
    unit: str = ""
    tells: str = ""
    scale: float = 1.0
    axis: Literal["", "log", "zero"] = ""
    """log: logarithmic where the values differ tenfold; zero: begins at 0."""


CHARTS = (
    Chart(
        "Loss", ("loss", "*_loss"), "nats", "Of the global batch, and its parts; parts may have weights.", axis="log"
    ),
    Chart(
        "Accuracy",
        ("accuracy",),
        "share",
        "Queries with their passage before all negatives.",
        axis="zero",
    ),
    Chart("Gradient norm", ("grad_norm",), "L2", "Of the whole batch's gradient, before it is clipped.", axis="log"),
    Chart("Learning rate", ("lr",), "", "As scheduled: up in the warm-up, then down.", axis="zero"),
    Chart("Temperature", ("temperature",), "", "Divides the scores; smaller is sharper."),
    Chart(
        "Speed in rows",
        ("samples_per_second",),
        "rows / s",
        "Of all devices, evaluations too.",
        axis="zero",
    ),
    Chart("Speed in tokens", ("tokens_per_second",), "tokens / s", "Of all devices, without padding.", axis="zero"),
    Chart("Padding", ("padding_share",), "% of tokens", "What was computed for nothing.", 100, "zero"),
    Chart("Peak memory", ("peak_memory_bytes",), "GiB", "Of the fullest device since the start.", 2.0**-30, "zero"),
    Chart(
        "Skipped steps",
        ("skipped",),
        "steps so far",
        "No update: the gradient was not finite.",
        axis="zero",
    ),
)
_NOT_DRAWN = ("step", "epoch", "evaluation")


class Series(NamedTuple):
    name: str
    step_N: np.ndarray
    value_N: np.ndarray
    not_finite: int
    """Lines that had null instead of a number."""


def write_report(run_dir: Path, *, plan: str = "") -> Path:
    """Draw what lies in the run folder, and the plan in words; a piece that is missing is left out."""
    lines = read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else []
    logged = [line for line in lines if "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    summary, environment = (_read(run_dir / name) for name in ("summary.json", "environment.json"))
    recipe = run_dir / "config.yaml"
    final = summary.pop("final", {})
    parts = [
        f"<h1>{escape(run_dir.name)}</h1><p class=muted>{escape(_subtitle(summary, environment))}</p>",
        facts(_highlights(summary, final, logged, evaluations)),
        *_training(logged),
        *_evaluations(evaluations),
        "<h2>In numbers</h2>",
        table(list({**summary, **final}.items())),
        "<h2>How it was made</h2>",
        _folded("Plan", f"<pre>{escape(plan)}</pre>") if plan else "",
        _folded("Recipe", f"<pre>{escape(recipe.read_text(encoding='utf-8'))}</pre>") if recipe.is_file() else "",
        _folded("Environment", table([(k, _flat(v)) for k, v in environment.items()])) if environment else "",
    ]
    return page(run_dir / "report.html", run_dir.name, parts)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _folded(title: str, body: str) -> Html:
    return Html(f"<details><summary>{escape(title)}</summary>{body}</details>")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- what one sees first ---------------------------------------------------------------------


def _subtitle(summary: Line, environment: Line) -> str:
    stopped = f"stopped by {summary['stopped_by']}" if summary.get("stopped_by") else "unfinished"
    state = "finished" if summary.get("finished") else stopped
    where = f"{environment['world_size']} x {environment['device']}" if "device" in environment else ""
    return ", ".join(filter(None, (state, where)))


def _highlights(summary: Line, final: Line, logged: Sequence[Line], evaluations: Sequence[Line]) -> dict[str, object]:
    found: dict[str, object] = {}
    if "steps" in summary:
        found["Steps"] = f"{summary['steps']:,} of {summary.get('total_steps', summary['steps']):,}"
    if "seconds" in summary:
        found["Time"] = str(timedelta(seconds=round(summary["seconds"])))
    if "loss" in final:
        found["Last loss"] = final["loss"]
    if scored := [line for line in evaluations if line.get("ndcg_at_10") is not None]:
        best = max(scored, key=lambda line: line["ndcg_at_10"])
        found["Best nDCG@10"] = f"{best['ndcg_at_10']:.4f} at step {best['step']:,}"
    if rates := [line["tokens_per_second"] for line in logged if line.get("tokens_per_second")]:
        found["Tokens / s, median"] = float(np.median(rates))
    if "peak_memory_bytes" in final:
        found["Peak memory"] = f"{final['peak_memory_bytes'] / 2**30:.2f} GiB"
    names = {"skipped": "Skipped steps", "rows": "Rows of data", "tokens": "Tokens of data"}
    found |= {title: summary[name] for name, title in names.items() if name in summary}
    for name in ("truncated", "dropped"):
        if name in summary:
            share = f" ({summary[name] / summary['rows']:.1%} of rows)" if summary.get("rows") else ""
            found[f"Texts {name}"] = f"{summary[name]:,}{share}"
    return found


# --- curves ----------------------------------------------------------------------------------


def _training(lines: Sequence[Line]) -> list[str]:
    """A figure for each chart that has something to show; what never changes is told in a line."""
    every = _series(lines)
    known = {name for chart in CHARTS for name in every if _takes(chart, name)}
    others = [Chart(name.replace("_", " ").capitalize(), (name,)) for name in every if name not in known]
    figures, constant = [], {}
    for chart in (*CHARTS, *others):
        found = [s._replace(value_N=s.value_N * chart.scale) for name, s in every.items() if _takes(chart, name)]
        found.sort(key=lambda each: each.name != "loss")  # the whole before its parts
        if len(found) == 1 and np.ptp(found[0].value_N) == 0 and not found[0].not_finite:
            constant[chart.title] = " ".join((number(found[0].value_N[0].item()), chart.unit)).strip()
        elif found:
            figures.append(curves(chart, found))
    if not figures:
        return []
    same = ", ".join(f"{title.lower()} {value}" for title, value in constant.items())
    told = "Thin lines are as logged, bold ones their running mean. The mouse over a curve tells its numbers."
    return ["<h2>Training</h2>", f"<p class=muted>{told}</p>", *figures] + (
        [f"<p>The same throughout: {escape(same)}.</p>"] if same else []
    )


def _takes(chart: Chart, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in chart.fields)


def _series(lines: Sequence[Line]) -> dict[str, Series]:
    """Each field over steps; without those that have no number."""
    points: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _NOT_DRAWN and not isinstance(value, str):
                points.setdefault(name, []).append((line["step"], value))
    found = {}
    for name, pairs in points.items():
        step_N, value_N = np.array(pairs, dtype=np.float64).T  # null becomes NaN
        finite_N = np.isfinite(value_N)
        if finite_N.any():
            found[name] = Series(name, step_N[finite_N], value_N[finite_N], int((~finite_N).sum()))
    return found


def curves(chart: Chart, series: Sequence[Series]) -> Html:
    """Values over steps, at most `_POINTS` of each, so chosen that a spike of one step stays."""
    log = chart.axis == "log" and _spread(series) > 10

    def draw(axes: Axes) -> list[Mark]:
        for i, each in enumerate(series):
            mean = _running_mean(each)
            marker = "o" if len(each.step_N) < 30 else ""
            faint: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35} if mean else {"marker": marker, "markersize": 3.5}
            axes.plot(*thinned(each.step_N, each.value_N), color=f"C{i}", **faint)
            if mean:
                axes.plot(*mean, color=f"C{i}")
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        if log:
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _spread(series) < 300 else (1,)))
        elif chart.axis == "zero":
            axes.set_ylim(0, 1.05 * max(float(each.value_N.max()) for each in series) or 1)
        axes.yaxis.set_major_formatter(lambda y, _: number(float(y)))
        return _marks(series)

    return figure(chart.title, draw, key=[_in_numbers(each) for each in series], caption=chart.tells)


def thinned(x_N: np.ndarray, y_N: np.ndarray, most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each stretch, in order, where there are more than `most`."""
    if len(x_N) <= most:
        return x_N, y_N
    kept = {0, len(x_N) - 1}
    for part in np.array_split(np.arange(len(x_N)), most // 2 - 1):
        kept |= {int(part[y_N[part].argmin()]), int(part[y_N[part].argmax()])}
    rows = sorted(kept)
    return x_N[rows], y_N[rows]


def _running_mean(series: Series) -> tuple[np.ndarray, np.ndarray] | None:
    """Over a fortieth of the points; none where they are few, or go up and down too little to need it."""
    window = len(series.step_N) // 40
    if window < 3 or np.abs(np.diff(series.value_N)).sum() < 4 * np.ptp(series.value_N):
        return None
    sums = np.cumsum(np.insert(series.value_N, 0, 0.0))
    mean = (sums[window:] - sums[:-window]) / window
    middle = series.step_N[window // 2 :][: len(mean)]
    every = -(-len(mean) // _POINTS)
    return middle[::every], mean[::every]


def _spread(series: Sequence[Series]) -> float:
    """Highest over lowest value; 1 where a logarithm has no place."""
    every = np.concatenate([each.value_N for each in series])
    return float(every.max() / every.min()) if every.min() > 0 else 1.0


def _marks(series: Sequence[Series]) -> list[Mark]:
    """For each stretch of steps the numbers of the step nearest to its middle."""
    low, high = (pick([pick(each.step_N) for each in series]) for pick in (min, max))
    edges = np.linspace(low, high, min(_STRETCHES, max(len(each.step_N) for each in series)) + 1)
    found = []
    for left, right in pairwise(edges):
        told = []
        for each in series:
            i = int(np.abs(each.step_N - (left + right) / 2).argmin())
            told.append(f"{each.name} {number(float(each.value_N[i]))} at step {each.step_N[i]:,.0f}")
        found.append(Mark(left, right, "\n".join(told)))
    return found


def _in_numbers(series: Series) -> Html:
    lowest, highest = int(series.value_N.argmin()), int(series.value_N.argmax())
    told = f"last {number(float(series.value_N[-1]))}, " + ", ".join(
        f"{word} {number(float(series.value_N[i]))} at {series.step_N[i]:,.0f}"
        for word, i in (("lowest", lowest), ("highest", highest))
    )
    told += f", not finite in {series.not_finite} lines" if series.not_finite else ""
    return Html(f"{escape(series.name)} <span class=muted>{escape(told)}</span>")


# --- evaluations -----------------------------------------------------------------------------


def _evaluations(lines: Sequence[Line]) -> list[str]:
    """For each evaluation its metrics over steps, those of one cutoff together, and all numbers in a table."""
    parts = []
    for name in dict.fromkeys(line["evaluation"] for line in lines):
        own = [line for line in lines if line["evaluation"] == name]
        series = _series(own)
        parts.append(f"<h2>Evaluation on {escape(name)}</h2>")
        for cutoff in dict.fromkeys(metric.partition("_at_")[2] for metric in series):
            chart = Chart(f"Metrics at {cutoff}" if cutoff else "Metrics", (), tells="Higher is better.", axis="zero")
            parts.append(curves(chart, [s for metric, s in series.items() if metric.partition("_at_")[2] == cutoff]))
        rows = [[line["step"], *(_best(own, metric, line.get(metric)) for metric in series)] for line in own[-50:]]
        parts.append(table(rows, ["step", *(metric.replace("_at_", "@") for metric in series)]))
    return parts


def _best(lines: Sequence[Line], metric: str, value: float | None) -> Html:
    """The number, in bold where no other line has a higher one."""
    if not isinstance(value, (int, float)):
        return escape(number(value))
    best = value == max(line[metric] for line in lines if line.get(metric) is not None)
    return Html(f"<b>{value:.4f}</b>" if best else f"{value:.4f}")
