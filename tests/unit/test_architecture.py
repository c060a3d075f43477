"""The import law, and what the wheel may hold."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "lodestar": set(),
    "retrieval": {"lodestar"},
    "retromae": {"lodestar", "retrieval"},
    "contrastive": {"lodestar", "retrieval"},
}
FLOORS = {  # each imports only those before it
    "lodestar": (
        "secrets", "errors", "imports", "commands", "recipes_cli", "__main__", "rng", "devices", "files", "config",
        "data", "distributed", "models", "planning", "cli", "reporting", "training",
    ),
    "retrieval": ("embedding", "evaluation", "mining", "search", "export", "check"),
}  # fmt: skip


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
    "deepspeed": {"lodestar/distributed/runtime", "lodestar/training/zero"},
    "torch.distributed": {
        *(f"lodestar/distributed/{name}" for name in ("runtime", "rendezvous", "collectives", "testing")),
        *(f"lodestar/training/{name}" for name in ("ddp", "zero")),
    },
    "wandb": set(),
    "accelerate": {"lodestar/reporting/trackers", "lodestar/training/auto_batch_size"},
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


@pytest.mark.parametrize("package", FLOORS)
def test_each_part_of_a_package_imports_only_those_before_it(package: str) -> None:
    floors = FLOORS[package]
    found = {path.stem for path in (ROOT / package).iterdir() if path.stem not in ("__init__", "py", "__pycache__")}
    assert found == set(floors)
    for path in (ROOT / package).rglob("*.py"):
        here = path.relative_to(ROOT / package).with_suffix("").parts[0]
        if here == "__init__":
            continue  # the names that the package itself offers, each loaded when it is used
        for name in imports_of(path, at_start=False):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == package and other in floors and other != here:
                assert floors.index(other) < floors.index(here), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_files_import_each_other(package: str) -> None:
    graph = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {each for each in imports_of(path, at_start=True) if each.startswith(f"{package}.")}
    list(TopologicalSorter(graph).static_order())  # raises at a cycle


@pytest.mark.parametrize("library", ONLY)
def test_libraries_are_known_to_few(library: str) -> None:
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            found = {n for n in imports_of(path, at_start=False) if n == library or n.startswith(f"{library}.")}
            here = path.relative_to(ROOT).with_suffix("").as_posix()
            assert not found or here in ONLY[library], f"{path}: {found}"


LOADS_TORCH = ("torch", "transformers", "sentence_transformers", "accelerate", "deepspeed", "safetensors.torch", "mteb")
MAY_BE_ABSENT = ("faiss", "lancedb", "qdrant_client", "psycopg", "onnx", "onnxruntime", "onnxscript")  # the extras
IMPORTED_LATE = {  # besides those two kinds
    ("lodestar/data/readers", "datasets"): "a second before each mistake in a recipe would be told",
    ("lodestar/training/zero", "deepspeed"): "its environment must be prepared first; DDP does without it",
    ("lodestar/reporting/html", "matplotlib"): "a quarter of a second, and rank 0 alone draws, at the end of a run",
    ("lodestar/reporting/training_report", "matplotlib"): "as html",
}


def is_of(name: str, libraries: Iterable[str]) -> bool:
    return any(name == library or name.startswith(f"{library}.") for library in libraries)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def our_files() -> list[Path]:
    return [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")]


@pytest.fixture(scope="module")
def loads_torch() -> set[str]:
    """Libraries, and dotted names of our files, that import torch when they are imported."""
    imports = {dotted(path): imports_of(path, at_start=True) for path in our_files()}
    heavy = {name for name, imported in imports.items() if any(is_of(other, LOADS_TORCH) for other in imported)}
    while more := {name for name, imported in imports.items() if imported & heavy} - heavy:
        heavy |= more
    return heavy | set(LOADS_TORCH)


def test_what_plans_and_explains_mistakes_loads_without_torch(loads_torch: set[str]) -> None:
    for path in our_files():
        if path.stem in ("config", "plan", "cli") or path.parent.name in ("config", "planning"):
            assert dotted(path) not in loads_torch, f"{path.relative_to(ROOT)} loads torch"


def imports_in_functions(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, set[str]]]:
    """Each import inside a function, with the dotted names that it imports."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import):
            yield node, {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield node, {f"{node.module}.{alias.name}" for alias in node.names}


def test_imports_stand_at_the_top_unless_they_keep_torch_out(loads_torch: set[str]) -> None:
    for path in our_files():
        here = path.relative_to(ROOT).with_suffix("").as_posix()
        late = {library for file, library in IMPORTED_LATE if file == here}
        allowed = {*MAY_BE_ABSENT, *late, *(() if dotted(path) in loads_torch else loads_torch)}
        for node, names in imports_in_functions(ast.parse(path.read_text(encoding="utf-8"))):
            wrong = {name for name in names if not is_of(name, allowed)}
            assert not wrong, f"{here}.py:{node.lineno} imports {sorted(wrong)} inside a function"


COMMANDS_LOAD_BY = ("lodestar/training/command", "retrieval/search/index")  # and each cli


def test_commands_load_torch_by_quick_imports(loads_torch: set[str]) -> None:
    for path in our_files():
        here = path.relative_to(ROOT).with_suffix("").as_posix()
        if path.stem != "cli" and here not in COMMANDS_LOAD_BY:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.With) and ast.unparse(n.items[0]) == "quick_imports()"]
        quick = {inner for block in blocks for inner in ast.walk(block)}
        for node, names in imports_in_functions(tree):
            late = {name for name in names if is_of(name, loads_torch)}
            assert not late or node in quick, f"{here}.py:{node.lineno} imports {sorted(late)} without quick_imports"


def test_tests_start_processes_in_one_place() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        wrong = {name for name in map(ast.unparse, calls) if name.startswith(("subprocess.", "os.system", "os.exec"))}
        assert not wrong or path == ROOT / "tests/processes.py", f"{path}: {wrong} (tests.processes has a limit)"
