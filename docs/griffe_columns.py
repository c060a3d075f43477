"""Docstrings for the reference pages: aligned `name   what it is` columns become Markdown lists.

mkdocs.yml names this file as an extension of griffe, which reads the sources.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")


def with_lists(docstring: str) -> str:
    """The docstring with each run of columns as a list; other lines stay as they are."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        if entry := ENTRY.fullmatch(line):
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            lines += [*([] if in_list else [""]), f"- {names}: {entry['text']}"]
            in_list = True
        elif in_list and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            lines += ["", line] if in_list else [line]
            in_list = False
    return "\n".join(lines)


class Columns(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)
