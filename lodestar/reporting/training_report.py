"""report.html: the curves and numbers of a training run in one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from lodestar.reporting.html import Mark, facts, figure, number, page, table
from lodestar.reporting.trackers import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]
"""Of metrics.jsonl."""
_POINTS = 400
"""Of a curve, at most, so that the size of the file does not depend on the length of the run."""
_HOVER_INTERVALS = 60
"""Of the x axis, with a tooltip each."""


class Chart(NamedTuple):
    """A figure of the report, and the metrics that it shows."""

    title: str
    fields: tuple[str, ...]
    """Of metrics.jsonl; may hold wildcards."""
    unit: str = ""
    caption: str = ""
    scale: float = 1.0
    axis: Literal["", "log", "zero"] = ""
    """log: logarithmic where the values differ more than tenfold; zero: starts at 0."""


CHARTS = (
    Chart(
        "Loss", ("loss", "*_loss"), "nats", "Of the global batch, and its parts; parts may have weights.", axis="log"
    ),
    Chart(
        "Accuracy",
        ("accuracy",),
        "fraction",
        "Queries whose passage scores above all negatives.",
        axis="zero",
    ),
    Chart("Gradient norm", ("grad_norm",), "L2", "Of the whole batch's gradient, before it is clipped.", axis="log"),
    Chart("Learning rate", ("lr",), "", "As scheduled: up in the warm-up, then down.", axis="zero"),
    Chart("Temperature", ("temperature",), "", "Divides the scores; smaller is sharper."),
    Chart(
        "Speed in examples",
        ("samples_per_second",),
        "examples / s",
        "Of all devices, evaluations included.",
        axis="zero",
    ),
    Chart("Speed in tokens", ("tokens_per_second",), "tokens / s", "Of all devices, without padding.", axis="zero"),
    Chart(
        "Padding", ("padding_share",), "% of tokens", "Fraction of the computed tokens that are padding.", 100, "zero"
    ),
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
    """A metric over steps; N is the number of finite values."""

    name: str
    step_N: np.ndarray
    value_N: np.ndarray
    not_finite: int
    """Lines with null instead of a number."""


def write_report(run_dir: Path, *, plan: str = "") -> Path:
    """Write report.html from the files of the run folder and the plan as text; missing files are left out."""
    lines = read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else []
    logged = [line for line in lines if "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    summary, environment = (_read(run_dir / name) for name in ("summary.json", "environment.json"))
    recipe = run_dir / "config.yaml"
    last_values = summary.pop("final", {})
    parts = [
        f"<h1>{escape(run_dir.name)}</h1><p class=muted>{escape(_subtitle(summary, environment))}</p>",
        facts(_highlights(summary, last_values, logged, evaluations)),
        *_training(logged),
        *_evaluations(evaluations),
        "<h2>All values</h2>",
        table(list({**summary, **last_values}.items())),
        "<h2>Setup</h2>",
        _folded("Plan", f"<pre>{escape(plan)}</pre>") if plan else "",
        _folded("Recipe", f"<pre>{escape(recipe.read_text(encoding='utf-8'))}</pre>") if recipe.is_file() else "",
        _folded("Environment", table([(k, _flat(v)) for k, v in environment.items()])) if environment else "",
    ]
    return page(run_dir / "report.html", run_dir.name, parts)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _folded(title: str, body: str) -> Markup:
    return Markup(f"<details><summary>{escape(title)}</summary>{body}</details>")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- summary ---------------------------------------------------------------------------------


def _subtitle(summary: Line, environment: Line) -> str:
    stopped = f"stopped by {summary['stopped_by']}" if summary.get("stopped_by") else "unfinished"
    state = "finished" if summary.get("finished") else stopped
    where = f"{environment['world_size']} x {environment['device']}" if "device" in environment else ""
    return ", ".join(filter(None, (state, where)))


def _highlights(
    summary: Line, last_values: Line, logged: Sequence[Line], evaluations: Sequence[Line]
) -> dict[str, object]:
    highlights: dict[str, object] = {}
    if "steps" in summary:
        highlights["Steps"] = f"{summary['steps']:,} of {summary.get('total_steps', summary['steps']):,}"
    if "seconds" in summary:
        highlights["Time"] = str(timedelta(seconds=round(summary["seconds"])))
    if "loss" in last_values:
        highlights["Last loss"] = last_values["loss"]
    if evaluated := [line for line in evaluations if line.get("ndcg_at_10") is not None]:
        best = max(evaluated, key=lambda line: line["ndcg_at_10"])
        highlights["Best nDCG@10"] = f"{best['ndcg_at_10']:.4f} at step {best['step']:,}"
    if rates := [line["tokens_per_second"] for line in logged if line.get("tokens_per_second")]:
        highlights["Tokens / s, median"] = float(np.median(rates))
    if "peak_memory_bytes" in last_values:
        highlights["Peak memory"] = f"{last_values['peak_memory_bytes'] / 2**30:.2f} GiB"
    names = {"skipped": "Skipped steps", "rows": "Examples", "tokens": "Tokens"}
    highlights |= {title: summary[name] for name, title in names.items() if name in summary}
    for name in ("truncated", "dropped"):
        if name in summary:
            fraction = f" ({summary[name] / summary['rows']:.1%} of examples)" if summary.get("rows") else ""
            highlights[f"Texts {name}"] = f"{summary[name]:,}{fraction}"
    return highlights


# --- curves ----------------------------------------------------------------------------------


def _training(lines: Sequence[Line]) -> list[str]:
    """A figure for each chart with values, and a line of the metrics that are constant."""
    by_name = _series(lines)
    in_charts = {name for chart in CHARTS for name in by_name if _shows(chart, name)}
    others = [Chart(name.replace("_", " ").capitalize(), (name,)) for name in by_name if name not in in_charts]
    figures, constants = [], {}
    for chart in (*CHARTS, *others):
        series = [s._replace(value_N=s.value_N * chart.scale) for name, s in by_name.items() if _shows(chart, name)]
        series.sort(key=lambda one: one.name != "loss")  # the loss before its terms
        if len(series) == 1 and np.ptp(series[0].value_N) == 0 and not series[0].not_finite:
            constants[chart.title] = " ".join((number(series[0].value_N[0].item()), chart.unit)).strip()
        elif series:
            figures.append(curves(chart, series))
    if not figures:
        return []
    legend = "Thin lines are logged values, bold lines their running mean. Hover over a curve to see its values."
    constant = ", ".join(f"{title.lower()} {value}" for title, value in constants.items())
    return ["<h2>Training</h2>", f"<p class=muted>{legend}</p>", *figures] + (
        [f"<p>Constant: {escape(constant)}.</p>"] if constant else []
    )


def _shows(chart: Chart, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in chart.fields)


def _series(lines: Sequence[Line]) -> dict[str, Series]:
    """Each metric over steps; metrics without a finite number are left out."""
    points: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _NOT_DRAWN and not isinstance(value, str):
                points.setdefault(name, []).append((line["step"], value))
    series = {}
    for name, pairs in points.items():
        step_N, value_N = np.array(pairs, dtype=np.float64).T  # null becomes NaN
        finite_N = np.isfinite(value_N)
        if finite_N.any():
            series[name] = Series(name, step_N[finite_N], value_N[finite_N], int((~finite_N).sum()))
    return series


def curves(chart: Chart, series: Sequence[Series]) -> Markup:
    """Values over steps; at most `_POINTS` of each series, with every spike."""
    from matplotlib.ticker import LogLocator

    log = chart.axis == "log" and _spread(series) > 10

    def draw(axes: Axes) -> list[Mark]:
        for i, one in enumerate(series):
            mean = _running_mean(one)
            marker = "o" if len(one.step_N) < 30 else ""
            style: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35} if mean else {"marker": marker, "markersize": 3.5}
            axes.plot(*thinned(one.step_N, one.value_N), color=f"C{i}", **style)
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
            axes.set_ylim(0, 1.05 * max(float(one.value_N.max()) for one in series) or 1)
        axes.yaxis.set_major_formatter(lambda y, _: number(float(y)))
        return _marks(series)

    return figure(chart.title, draw, key=[_summary_of(one) for one in series], caption=chart.caption)


def thinned(x_N: np.ndarray, y_N: np.ndarray, max_points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `max_points` points, in order: of each interval the lowest and the highest."""
    if len(x_N) <= max_points:
        return x_N, y_N
    indices = {0, len(x_N) - 1}
    for interval in np.array_split(np.arange(len(x_N)), max_points // 2 - 1):
        indices |= {int(interval[y_N[interval].argmin()]), int(interval[y_N[interval].argmax()])}
    rows = sorted(indices)
    return x_N[rows], y_N[rows]


def _running_mean(series: Series) -> tuple[np.ndarray, np.ndarray] | None:
    """The mean over a fortieth of the points; none where the points are few, or the curve is smooth."""
    window = len(series.step_N) // 40
    if window < 3 or np.abs(np.diff(series.value_N)).sum() < 4 * np.ptp(series.value_N):
        return None
    sums = np.cumsum(np.insert(series.value_N, 0, 0.0))
    mean = (sums[window:] - sums[:-window]) / window
    middle = series.step_N[window // 2 :][: len(mean)]
    stride = -(-len(mean) // _POINTS)
    return middle[::stride], mean[::stride]


def _spread(series: Sequence[Series]) -> float:
    """Highest over lowest value; 1 where one is not positive, which has no logarithm."""
    values = np.concatenate([one.value_N for one in series])
    return float(values.max() / values.min()) if values.min() > 0 else 1.0


def _marks(series: Sequence[Series]) -> list[Mark]:
    """For each interval of steps the values of the step nearest to its middle."""
    first, last = min(one.step_N.min() for one in series), max(one.step_N.max() for one in series)
    edges = np.linspace(first, last, min(_HOVER_INTERVALS, max(len(one.step_N) for one in series)) + 1)
    marks = []
    for left, right in pairwise(edges):
        lines = []
        for one in series:
            i = int(np.abs(one.step_N - (left + right) / 2).argmin())
            lines.append(f"{one.name} {number(float(one.value_N[i]))} at step {one.step_N[i]:,.0f}")
        marks.append(Mark(left, right, "\n".join(lines)))
    return marks


def _summary_of(series: Series) -> Markup:
    """The line of the figure's key: last, lowest and highest value."""
    lowest, highest = int(series.value_N.argmin()), int(series.value_N.argmax())
    text = f"last {number(float(series.value_N[-1]))}, " + ", ".join(
        f"{word} {number(float(series.value_N[i]))} at {series.step_N[i]:,.0f}"
        for word, i in (("lowest", lowest), ("highest", highest))
    )
    text += f", not finite in {series.not_finite} lines" if series.not_finite else ""
    return Markup(f"{escape(series.name)} <span class=muted>{escape(text)}</span>")


# --- evaluations -----------------------------------------------------------------------------


def _evaluations(lines: Sequence[Line]) -> list[str]:
    """For each evaluation its metrics over steps, a figure for each cutoff, and a table of the last 50."""
    parts = []
    for name in dict.fromkeys(line["evaluation"] for line in lines):
        evaluation_lines = [line for line in lines if line["evaluation"] == name]
        series = _series(evaluation_lines)
        parts.append(f"<h2>Evaluation on {escape(name)}</h2>")
        for cutoff in dict.fromkeys(metric.partition("_at_")[2] for metric in series):
            chart = Chart(f"Metrics at {cutoff}" if cutoff else "Metrics", (), caption="Higher is better.", axis="zero")
            parts.append(curves(chart, [s for metric, s in series.items() if metric.partition("_at_")[2] == cutoff]))
        rows = [
            [line["step"], *(_best(evaluation_lines, metric, line.get(metric)) for metric in series)]
            for line in evaluation_lines[-50:]
        ]
        parts.append(table(rows, ["step", *(metric.replace("_at_", "@") for metric in series)]))
    return parts


def _best(lines: Sequence[Line], metric: str, value: float | None) -> Markup:
    """The value, in bold where no line has a higher one."""
    if not isinstance(value, (int, float)):
        return escape(number(value))
    best = value == max(line[metric] for line in lines if line.get(metric) is not None)
    return Markup(f"<b>{value:.4f}</b>" if best else f"{value:.4f}")
