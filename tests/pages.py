"""The code of a page of docs/, for the tests that run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, heading: str | None = None, language: str = "python") -> list[str]:
    """The fenced blocks under `## heading`; none: those above the first heading of that level."""
    above, *sections = re.split(r"^## (.*)\n", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = above if heading is None else dict(zip(sections[::2], sections[1::2], strict=True))[heading]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def execute(page: str, *headings: str | None) -> dict[str, Any]:
    """Run those sections' code one after the other; the names that it leaves."""
    names: dict[str, Any] = {}
    for heading in headings:
        found = blocks(page, heading)
        assert found, f"{page}: {heading}: holds no code"
        for block in found:
            exec(compile(block, f"{page}, {heading}", "exec"), names)
    return names
