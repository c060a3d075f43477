"""`lodestar recipes` and `lodestar schema`: the recipes, and the JSON Schemas of their keys. Loads without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from lodestar.commands import COMMANDS, load, recipes_folder
from lodestar.errors import ConfigError, did_you_mean

SCHEMA_LINE = "# yaml-language-server: $schema="
"""A recipe's first line, by which YAML language servers complete and document its keys."""


def recipes_main(argv: Sequence[str] | None = None) -> int:
    """`lodestar recipes`: one line for each; `lodestar recipes finetune/48gpu`: that one, with its comments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = recipes_folder()
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    if not arguments:
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {summary(path)}" for name, path in names.items()))
    elif arguments in (["-h"], ["--help"]):
        print(f"usage: lodestar recipes [NAME]\n\n{recipes_main.__doc__}")
    elif len(arguments) == 1 and (name := arguments[0].removesuffix(".yaml")) in names:
        print(_with_schema_of(folder, names[name].read_text(encoding="utf-8")), end="")
    else:
        hint = did_you_mean(arguments[-1], names, f"one of {', '.join(names)}")
        raise ConfigError(f"command line: recipes: {' '.join(arguments)}: no such recipe ({hint})")
    return 0


def summary(path: Path) -> str:
    """The first comment of a recipe, up to its first full stop."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(SCHEMA_LINE))
    return next(lines).removeprefix("# ").partition(". ")[0].rstrip(".")


def _with_schema_of(folder: Path, text: str) -> str:
    """A recipe's text, with the full path of its schema."""
    first, newline, rest = text.partition("\n")
    if not first.startswith(SCHEMA_LINE):
        return text
    schema = folder / "schema" / Path(first.removeprefix(SCHEMA_LINE)).name
    return f"{SCHEMA_LINE}{schema}{newline}{rest}"


def schema_main(argv: Sequence[str] | None = None) -> int:
    """`lodestar schema finetune`: the JSON Schema of that command's recipe."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = [name for name, command in COMMANDS.items() if command.recipe]
    if arguments in (["-h"], ["--help"]):
        print(f"usage: lodestar schema {{{','.join(names)}}}\n\n{schema_main.__doc__}")
    elif len(arguments) == 1 and arguments[0] in names:
        print(json.dumps(schema(arguments[0]), indent=2, ensure_ascii=False))
    else:
        hint = did_you_mean((arguments or [""])[-1], names, f"one of {', '.join(names)}")
        raise ConfigError(f"command line: schema: {' '.join(arguments) or 'no command'}: has no recipe ({hint})")
    return 0


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema of a command's recipe; docstrings are its descriptions."""
    return cast(type[BaseModel], load(COMMANDS[command].recipe)).model_json_schema()
