"""YAML to a typed, frozen recipe; every error names file, line and field. Loads without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lodestar.commands import recipes_folder
from lodestar.errors import ConfigError, closest, did_you_mean

Recipe = TypeVar("Recipe", bound=BaseModel)
COMMAND_LINE = "command line"
IN_PYTHON = "recipe"
"""The place of a mistake in a recipe that is no file."""


class Section(BaseModel):
    """A part of a recipe: frozen, strict, without unknown keys; its attribute docstrings document the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass
class _Tree:
    """Plain values, and FILE:LINE for each dotted key."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[str, str] = field(default_factory=dict[str, str])


def load(schema: type[Recipe], path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read `path`, apply `KEY=VALUE` overrides, and validate the result against `schema`.

    Raises ConfigError with one line for each error: `FILE:LINE: FIELD: what is wrong (what to do)`.
    """
    return _check(schema, _read(Path(path)), str(path), overrides)


def recipe_of(
    schema: type[Recipe], source: Recipe | Mapping[str, object] | str | Path, overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe, its values as a mapping, or the path of its YAML file, with `KEY=VALUE` overrides laid on it.

    Raises as `load`; a mistake in values reads `recipe: FIELD: what is wrong (what to do)`.
    """
    if isinstance(source, str | Path):
        return load(schema, source, overrides)
    if isinstance(source, schema) and not overrides:
        return source
    values = source if isinstance(source, Mapping) else source.model_dump(mode="json")
    tree = _Tree(json.loads(json.dumps(dict(values), default=_json_value)))
    _add_places(tree.values, "", tree.places)
    return _check(schema, tree, IN_PYTHON, overrides)


def _json_value(value: object) -> object:
    """Of what JSON does not know: a section of a recipe as its values, a path as text."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def _add_places(value: Any, at: str, places: dict[str, str]) -> None:
    places[at] = IN_PYTHON
    if isinstance(value, list):
        value = dict(enumerate(cast(list[Any], value)))
    if isinstance(value, dict):
        for key, inner in cast(dict[Any, Any], value).items():
            _add_places(inner, f"{at}.{key}" if at else str(key), places)


def _check(schema: type[Recipe], tree: _Tree, file: str, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        _override(tree, override)
    try:
        return schema.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        misspelt = [_meant(schema, detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"]
        lines = [  # a misspelt key is one mistake, though the key that was meant is missing too
            _explain(schema, tree, file, detail)
            for detail in details
            if detail["type"] != "missing" or detail["loc"] not in misspelt
        ]
        raise ConfigError("\nerror: ".join(dict.fromkeys(lines))) from None


def dump(recipe: BaseModel) -> str:
    """The recipe as YAML; `load` reads it back to an equal recipe."""
    values = json.loads(recipe.model_dump_json())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def flat(recipe: object, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a recipe, or of what `read_values` returns, by dotted keys.

    without   keys and sections to leave out
    """
    values = json.loads(recipe.model_dump_json()) if isinstance(recipe, BaseModel) else recipe
    by_key: dict[str, Any] = {}
    _flatten(cast(dict[str, Any], values), "", by_key)
    return {key: value for key, value in by_key.items() if not covers(without, key)}


def _flatten(values: dict[str, Any], prefix: str, by_key: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(cast(dict[str, Any], value), f"{prefix}{key}.", by_key)
        else:
            by_key[prefix + key] = value


def covers(names: Sequence[str], key: str) -> bool:
    """Whether a dotted key, or a section that contains it, is among `names`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file, not validated against a schema; ConfigError where it is not valid YAML."""
    return _read(path).values


# --- reading ---------------------------------------------------------------------------------


def _read(path: Path) -> _Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = recipes_folder() / f"{path}.yaml"
        remedy = f"lodestar recipes {path} > my.yaml copies it" if shipped.is_file() else "name a YAML file"
        raise ConfigError(f"{path}: no such recipe ({remedy}; lodestar recipes lists those that come along)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:1: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: a recipe is a mapping of sections (as `optim:` with `lr: 1e-5` below it)")
    tree = _Tree()
    tree.values = _value(node, str(path), "", tree.places)
    return tree


def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.SafeLoader)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _value(node: yaml.Node, file: str, path: str, places: dict[str, str]) -> Any:
    """The node as plain values; ConfigError for duplicate keys. Scalars have the types of YAML 1.2."""
    line = node.start_mark.line + 1
    places.setdefault(path, f"{file}:{line}")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, key_line = str(key_node.value), key_node.start_mark.line + 1
            name = f"{path}.{key}" if path else key
            if key in result:
                first = places[name].rpartition(":")[2]
                raise ConfigError(f"{file}:{key_line}: {name}: already set on line {first} (keep one of the two)")
            places[name] = f"{file}:{key_line}"
            result[key] = _value(value_node, file, name, places)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, file, f"{path}.{i}", places) for i, item in enumerate(node.value)]
    return _scalar(node) if isinstance(node, yaml.ScalarNode) else None


_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """YAML 1.2's core types: `1e-5` is a number, `on` and `12:30:00` are text (YAML 1.1 reads all three otherwise)."""
    text = node.value
    if node.style is not None:  # quoted or block text
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


def _override(tree: _Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{COMMAND_LINE}: {override}: not an override (write KEY=VALUE, as optim.lr=1e-5)")
    try:
        # Only text that begins like a list, a mapping or a quotation is parsed: an instruction may end in ": ".
        node = (text.startswith(("[", "{", '"', "'")) and _compose(text)) or yaml.ScalarNode("", text)
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {key}: cannot read the value {text!r} (quote it)") from None
    *parents, last = key.split(".")
    section: Any = tree.values
    for parent in parents:
        child: Any = section.setdefault(parent, {})
        section = child
        if not isinstance(child, dict):
            raise ConfigError(f"{COMMAND_LINE}: {key}: {parent} is not a section")
    section[last] = _scalar(node) if isinstance(node, yaml.ScalarNode) else _value(node, COMMAND_LINE, key, {})
    tree.places = {path: place for path, place in tree.places.items() if not path.startswith(f"{key}.")}
    tree.places[key] = COMMAND_LINE


# --- explaining ------------------------------------------------------------------------------


def _explain(schema: type[BaseModel], tree: _Tree, file: str, detail: ErrorDetails) -> str:
    """One line for one of pydantic's errors, with the line of the YAML that caused it."""
    loc, names = [str(part) for part in detail["loc"]], list[str]()
    for i, part in enumerate(loc):  # pydantic names the branch of a union too; the YAML has no such key
        absent = detail["type"] == "missing" and i == len(loc) - 1
        if absent or ".".join([*names, part]) in tree.places:
            names.append(part)
    key = ".".join(names)
    place = tree.places.get(key) or tree.places.get(".".join(names[:-1])) or f"{file}:1"
    return ": ".join(dict.fromkeys([place, key or IN_PYTHON, _reason(schema, loc, detail)]))  # "recipe" once


def _reason(schema: type[BaseModel], names: list[str], detail: ErrorDetails) -> str:
    kind, message, got, context = detail["type"], detail["msg"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys(schema, names[:-1])
        return f"unknown key ({did_you_mean(names[-1], known, 'known here: ' + ', '.join(known))})"
    if kind == "missing":
        return "not set (it has no default)"
    if kind.startswith("union_tag"):
        known = context.get("expected_tags")
        return f"kind: must be one of {known}, got '{got['kind']}'" if known else "kind: not set (it has no default)"
    if kind == "value_error":
        return str(context["error"])
    message = message.removeprefix("Input should be ").replace("valid ", "")
    return f"must be {message}, got {json.dumps(got, ensure_ascii=False)}"


def _meant(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[int | str | None, ...]:
    """Where the key would be that an unknown key resembles."""
    names = [str(part) for part in loc]
    return *loc[:-1], closest(names[-1], _keys(schema, names[:-1]))


def _keys(schema: type[BaseModel], names: list[str]) -> list[str]:
    """The keys of the section at `names`."""
    candidates = [schema]
    for name in names:
        below = [s for c in candidates if name in c.model_fields for s in _sections(c.model_fields[name].annotation)]
        of_kind = [c for c in candidates if name in _kinds(c)]
        candidates = below or of_kind or candidates  # neither: the key of a mapping, or an index of a list
    return list(candidates[0].model_fields)


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    """The values of a section's key `kind`, if it has one."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _sections(annotation: object) -> list[type[BaseModel]]:
    """The sections that a field may have, also in a list, a mapping or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]
