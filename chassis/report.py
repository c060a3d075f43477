"""report.html: the curves and numbers of a run in one self-contained file."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

from chassis.track import METRICS, read_metrics

_CURVES = {
    "Loss": ("loss", "encoder_loss", "decoder_loss", "distillation_loss"),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
    "Texts per second": ("samples_per_second",),
    "Padding share": ("padding_share",),
    "Peak memory, bytes": ("peak_memory_bytes",),
    "Retrieval": ("ndcg_at_10", "mrr_at_10", "recall_at_100"),
}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
figure{display:inline-block;margin:0 1em 1em 0}figcaption{font-weight:600}svg{width:21em;height:auto}
td{padding:.1em 1em .1em 0;vertical-align:top}pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def write_report(run_dir: Path) -> Path:
    """Draw what lies in the run folder; a piece that is missing is left out."""
    lines = read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else []
    summary = _read(run_dir / "summary.json")
    parts = [f"<h1>{html.escape(run_dir.name)}</h1>", _table(summary | summary.pop("final", {}))]
    for title, names in _CURVES.items():
        if svg := _curve(lines, names):
            parts.append(f"<figure><figcaption>{title}</figcaption>{svg}</figure>")
    recipe = run_dir / "config.yaml"
    if recipe.is_file():
        parts.append(f"<details><summary>Recipe</summary><pre>{html.escape(recipe.read_text())}</pre></details>")
    parts.append(f"<details><summary>Environment</summary>{_table(_read(run_dir / 'environment.json'))}</details>")
    path = run_dir / "report.html"
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run_dir.name)}</title>'
        f"<style>{_STYLE}</style>{body}</html>\n",
        encoding="utf-8",
    )
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _table(values: dict[str, Any]) -> str:
    shown = {k: f"{v:,.4g}" if isinstance(v, float) else v for k, v in values.items()}
    rows = (f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in shown.items())
    return f"<table>{''.join(rows)}</table>"


def _curve(lines: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """An inline SVG of some fields over steps; empty where no line has them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 3 else None)
    if not axes.lines:
        return ""
    axes.set_xlabel("step")
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
