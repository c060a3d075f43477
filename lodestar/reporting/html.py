"""One HTML file that opens without a network: page, tables, and figures in the reader's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cycler import cycler
from markupsafe import Markup, escape

from lodestar.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = ("#1a66c9", "#c9510c", "#1a8a58", "#9a3fb5", "#b3261e", "#0f7f93", "#8a6a00")
"""Colours of curves, in this order; they differ from each other and from both backgrounds."""
INK, MUTED, LINE = "#1c2128", "#66707c", "#dfe3e8"
_DARK = ("#6aa9ff", "#ff9c57", "#4fd19a", "#d78cf0", "#ff7b72", "#4cc9de", "#e3b341")
_STYLE = (
    ":root{color-scheme:light dark;--paper:#fff;--soft:#f5f7f9;"
    + f"--ink:{INK};--muted:{MUTED};--line:{LINE};"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(SERIES))
    + "}@media(prefers-color-scheme:dark){:root{--paper:#14171b;--soft:#1e2329;--ink:#e4e8ed;--muted:#98a2ae;"
    + "--line:#343b44;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(_DARK))
    + "}}"
    + """
body{font:16px/1.55 system-ui,sans-serif;max-width:50rem;margin:2.5rem auto 5rem;padding:0 1.2rem;
background:var(--paper);color:var(--ink)}
h1{font-size:1.9rem;line-height:1.2;margin:0}h2{font-size:1.3rem;margin:3rem 0 .4rem}h3{font-size:1.02rem;margin:0}
p{margin:.3rem 0 1rem}.muted,figcaption,th,dt{color:var(--muted)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.7rem;margin:1.5rem 0}
dl.facts div{background:var(--soft);border-radius:.6rem;padding:.6rem .9rem}
dt{font-size:.82rem}dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
figure{margin:1.8rem 0 2.6rem}figcaption{font-size:.88rem}svg{display:block;width:100%;height:auto;margin-top:.5rem}
svg text{font-family:system-ui,sans-serif!important}.at rect{fill:transparent}
.at rect:hover{fill:var(--ink);fill-opacity:.12}
ul.key{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.3rem;margin:.3rem 0 0;padding:0;font-size:.88rem}
ul.key li::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:.2em;margin-right:.45em;
background:var(--c)}
.wide{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:500}td,th{padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--line);
vertical-align:top}td.number,th.number{text-align:right}td.text{overflow-wrap:anywhere}
td:first-child{white-space:nowrap}
details{border-top:1px solid var(--line);padding:.7rem 0}summary{cursor:pointer;font-weight:600}
pre{background:var(--soft);border-radius:.6rem;padding:.9rem;overflow-x:auto;font-size:.82rem;line-height:1.45}
article{background:var(--soft);border-radius:.6rem;padding:.8rem 1rem;margin:.8rem 0;overflow-wrap:anywhere}
article p{margin:.35rem 0 0;font-size:.92rem}"""
)


class Mark(NamedTuple):
    """A text that appears on hovering over part of a figure; bounds in the units of its axes."""

    left: float
    right: float
    text: str
    low: float = -math.inf
    high: float = math.inf


def page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write the file atomically; `parts` are markup."""
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n",
    )
    return path


def number(value: object) -> str:
    """A value as text: 0.3217, 12,345, 1.2e-05, yes, or str(value)."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "–" if value is None else str(value)


def facts(values: Mapping[str, object]) -> Markup:
    """Named values in tiles, the first thing on a page."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(number(value))}</dd></div>" for name, value in values.items())
    return Markup(f'<dl class="facts">{"".join(cells)}</dl>')


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> Markup:
    """A table with numbers aligned right; a cell may be Markup."""
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    heading = "".join(
        f'<th class="number">{escape(name)}</th>' if i else f"<th>{escape(name)}</th>" for i, name in enumerate(head)
    )
    return Markup(f'<div class="wide"><table>{f"<tr>{heading}</tr>" if head else ""}{body}</table></div>')


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float, Markup)) and not isinstance(value, bool)
    content = value if isinstance(value, Markup) else number(value)
    return f'<td class="{"number" if is_number else "text"}">{escape(content)}</td>'


def figure(
    title: str,
    draw: Callable[[Axes], Sequence[Mark] | None],
    *,
    key: Sequence[str] = (),
    caption: str = "",
    height: float = 2.3,
) -> Markup:
    """A figure as inline SVG, 7.2 inches wide.

    draw      draws on matplotlib's axes; may return marks
    key       one line for each of SERIES in use
    height    in inches
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED,
        "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True,
        "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.linewidth": 1.6,
        "axes.prop_cycle": cycler(color=SERIES), "axes.formatter.useoffset": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(7.2, height))
        axes = canvas.add_axes((0.1, 0.42 / height, 0.87, 1 - 0.5 / height))  # the same edges in every figure of a page
        marks = draw(axes) or ()
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        svg = re.sub(
            r'(?s)^.*?<svg.*?viewBox="(.*?)".*?>', r'<svg viewBox="\1" role="img">', buffer.getvalue(), count=1
        )
        svg = svg.replace("xlink:href", "href")  # SVG in HTML has no namespaces
        hover_areas = "".join(_hover_area(axes, mark) for mark in marks)
    names = {INK: "ink", MUTED: "muted", LINE: "line"} | {colour: f"c{i}" for i, colour in enumerate(SERIES)}
    svg = re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", svg)  # the theme sets the variables
    svg = re.sub(r"\s*\n\s*", "\n", svg).replace("</svg>", f'<g class="at">{hover_areas}</g></svg>')
    lines = "".join(f'<li style="--c:var(--c{i % len(SERIES)})">{escape(line)}</li>' for i, line in enumerate(key))
    legend = f'<ul class="key">{lines}</ul>' if key else ""
    figcaption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure><h3>{escape(title)}</h3>{figcaption}{legend}{svg}</figure>")


def _hover_area(axes: Axes, mark: Mark) -> str:
    """The mark as an invisible rectangle with a tooltip; SVG has points of 1/72 inch, from the top."""
    points_per_pixel = 72 / axes.figure.dpi
    lowest, highest = axes.get_ylim()
    corners = zip(mark[:2], (max(lowest, mark.low), min(highest, mark.high)), strict=True)
    (left, low), (right, high) = (axes.transData.transform(corner) * points_per_pixel for corner in corners)
    top = axes.figure.bbox.height * points_per_pixel - high
    size = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{high - low:.1f}"'
    return f"<rect {size}><title>{escape(mark.text)}</title></rect>"
