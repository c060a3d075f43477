"""Writes what the documentation takes from the code, by `make reference`; a test says when it is stale.

docs/reference/lodestar-COMMAND.md and configs/schema/COMMAND.json from the recipes' schemas; in docs/architecture.md
the first line of each file, in docs/models.md the known models.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lodestar.commands import COMMANDS
from lodestar.recipes_cli import schema, summary
from retrieval.embedding.known_models import KNOWN_MODELS

ROOT = Path(__file__).parents[1]
FOLDERS = ("lodestar", "retrieval", "retromae", "contrastive", "launch", "examples", "benchmarks")
Node = dict[str, Any]


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> dict[Path, str]:
    """Every generated file and what it holds."""
    contents: dict[Path, str] = {}
    for command in (name for name, command in COMMANDS.items() if command.recipe):
        definition = schema(command)
        text = json.dumps(definition, indent=1, ensure_ascii=False) + "\n"
        contents[ROOT / "configs/schema" / f"{command}.json"] = text
        contents[ROOT / "docs/reference" / f"lodestar-{command}.md"] = page(command, definition)
    for name, mark, text in (("architecture", "files", file_map()), ("models", "known models", known_models())):
        path = ROOT / f"docs/{name}.md"
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = path.read_text(encoding="utf-8").partition(start)
        contents[path] = f"{before}{start}{text}{end}{rest.partition(end)[2]}"
    return contents


def file_map() -> str:
    """Each file with the first line of its docstring, each recipe with its first comment."""
    lines: list[str] = []
    for folder in FOLDERS:
        paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py"]
        for path in sorted(paths, key=lambda path: (path.parent != ROOT / folder, path)):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = docstring.partition("\n")[0].replace(" Loads without torch.", "").rstrip(".")
            lines.append(f"{path.relative_to(ROOT).as_posix():<42} {first}")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines.append(f"{path.relative_to(ROOT).as_posix():<42} {summary(path)}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def known_models() -> str:
    lines = ["| models | pooling | query | passage | tokens | languages |", "|---|---|---|---|---:|---|"]
    for model in KNOWN_MODELS:
        name = model.name.replace("\\.", ".").replace("(", "{").replace(")", "}").replace("|", ",").replace("}?", "}")
        instructions = [f"`{text}`" if text else "none" for text in (model.query, model.document)]
        pooling = "[CLS]" if model.pooling == "cls" else model.pooling
        cells = [f"`{name}`", pooling, *instructions, f"{model.max_length:,}", model.languages]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(command: str, definition: Node) -> str:
    """A table of keys for each section."""
    lines = [
        f"# `lodestar {command}`",
        "",
        f"Every key of a recipe for `lodestar {command}`: {COMMANDS[command].summary}. Generated from the code.",
        "",
    ]
    for name, section in sections(definition, definition, ""):
        lines += [f"## `{name}`" if name else "## Top level", ""]
        if name and (text := section.get("description")):
            lines += [one_line(text), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in section["properties"].items():
            lines.append(f"| `{key}` | {kind(field)} | {default(key, field, section)} | {meaning(field, definition)} |")
        lines.append("")
    return "\n".join(lines)


def sections(definition: Node, node: Node, name: str) -> Iterator[tuple[str, Node]]:
    """(dotted name, schema) of a section and of those below it."""
    yield name, node
    for key, field in node["properties"].items():
        for choice in targets(field):
            below = definition["$defs"][choice]
            if "properties" not in below:
                continue
            label = f"{name}.{key}" if name else key
            if field.get("type") == "array" or "items" in json.dumps(field):
                label += "[]"
            elif "additionalProperties" in field:
                label += ".NAME"
            kinds = below["properties"].get("kind", {})
            if "const" in kinds:
                label += f" (kind: {kinds['const']})"
            yield from sections(definition, below, label)


def targets(field: Node) -> list[str]:
    """Names of the definitions that a field refers to."""
    return list(dict.fromkeys(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(field))))


def kind(field: Node) -> str:
    """The type of a field, for a reader."""
    if "enum" in field:
        return ", ".join(f"`{'false' if value is False else value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "section"
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(dict.fromkeys(kind(choice) for choice in field.get("anyOf", field.get("oneOf"))))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return "list of " + ", ".join(kind(item) for item in field["prefixItems"])
        return f"list of {kind(field['items'])}"
    if field.get("type") == "object":
        return f"mapping of {kind(field['additionalProperties'])}"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false", "null": "none"}
    return names.get(field["type"], field["type"]) + bounds(field)


def bounds(field: Node) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f" {' and '.join(limits)}" if limits else ""


def default(key: str, field: Node, section: Node) -> str:
    if key in section.get("required", ()):
        return "required"
    value = field.get("default")
    if isinstance(value, dict):
        return "see below"
    return "none" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def meaning(field: Node, definition: Node) -> str:
    text = field.get("description") or next(
        (definition["$defs"][name].get("description", "") for name in targets(field)), ""
    )
    return one_line(text)


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
