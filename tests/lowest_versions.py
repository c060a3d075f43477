"""The lowest versions that pyproject.toml allows, as requirements: python tests/lowest_versions.py"""

from __future__ import annotations

import re
from pathlib import Path


def lowest_versions(pyproject: str) -> dict[str, str]:
    """By package, of all dependencies but those of the documentation."""
    lines = [line for line in pyproject.splitlines() if not line.startswith("docs =")]
    return dict(re.findall(r'"([\w\[\]-]+)>=([\w.]+)"', "\n".join(lines)))


if __name__ == "__main__":
    for name, version in lowest_versions(Path("pyproject.toml").read_text(encoding="utf-8")).items():
        print(f"{name}=={version}")
