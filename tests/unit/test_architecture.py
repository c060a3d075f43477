"""The import law, and what the wheel may hold."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {"chassis": set(), "retromae": {"chassis"}, "contrastive": {"chassis"}}


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_downwards(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        extra = top_level_imports(path) & (MAY_IMPORT.keys() | {"launch"}) - MAY_IMPORT[package] - {package}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


ONLY = {  # who may know what
    "deepspeed": {"runtime", "engine"},
    "torch.distributed": {"runtime", "collectives", "engine", "testing"},
    "wandb": set(),
    "accelerate": {"track", "trial"},
}


def imports_of(path: Path, *, at_start: bool) -> set[str]:
    """Dotted names; with `at_start` only those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_chassis_has_an_order_in_which_each_file_imports_only_those_before_it() -> None:
    files = {path.stem: path for path in (ROOT / "chassis").glob("*.py") if path.stem != "__init__"}
    wanted = {
        name: {each.split(".")[1] for each in imports_of(path, at_start=True) if each.startswith("chassis.")}
        for name, path in files.items()
    }
    list(TopologicalSorter(wanted).static_order())  # raises at a cycle
    assert wanted["errors"] == set() and wanted["loop"] >= {"engine"}


@pytest.mark.parametrize("library", ONLY)
def test_libraries_are_known_to_few(library: str) -> None:
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            found = {n for n in imports_of(path, at_start=False) if n == library or n.startswith(f"{library}.")}
            assert not found or (path.stem in ONLY[library] and package == "chassis"), f"{path}: {found}"
