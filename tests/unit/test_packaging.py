"""What a wheel holds."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests import tiny

ROOT = Path(__file__).parents[2]
PACKAGES = ("lodestar", "retrieval", "retromae", "contrastive")


def test_the_wheel_holds_the_packages_and_the_recipes_and_nothing_else(tmp_path: Path) -> None:
    wheel = tiny.build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    ours = {p.relative_to(ROOT).as_posix() for top in PACKAGES for p in (ROOT / top).rglob("*.py")}
    recipes = {f"lodestar/recipes/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert ours | recipes <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(f"{package}/py.typed" in names for package in PACKAGES)
