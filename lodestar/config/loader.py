"""YAML to a typed, frozen recipe; every error names file, line and field. Loads without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lodestar.config.explain import explain
from lodestar.config.tree import COMMAND_LINE, Tree, from_values, override, read_file
from lodestar.errors import ConfigError

Recipe = TypeVar("Recipe", bound=BaseModel)


class Section(BaseModel):
    """A part of a recipe: frozen, strict, without unknown keys; its attribute docstrings document the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def load(schema: type[Recipe], path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read `path`, apply `KEY=VALUE` overrides, and validate the result against `schema`.

    Raises ConfigError with one line for each error: `FILE:LINE: FIELD: what is wrong (what to do)`.
    """
    return validate(schema, read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The values of a recipe with their places; ConfigError where it is not valid YAML, or an override is none."""
    return _overridden(read_file(Path(path)), overrides)


def validate(schema: type[Recipe], tree: Tree) -> Recipe:
    """The recipe that a tree holds; raises as `load`."""
    _leave_out_alternatives(schema, tree)
    tree.check_values()
    try:
        return schema.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        lines = explain(schema, tree, error.errors(include_url=False))
        raise ConfigError("\nerror: ".join(lines)) from None


def recipe_of(
    schema: type[Recipe], source: Recipe | Mapping[str, object] | str | Path, overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe, its values as a mapping, or the path of its YAML file, with `KEY=VALUE` overrides laid on it.

    Raises as `load`; a mistake in values reads `recipe: FIELD: what is wrong (what to do)`.
    """
    if isinstance(source, str | Path):
        return load(schema, source, overrides)
    if isinstance(source, schema) and not overrides:
        from_values(source.model_dump(mode="json")).check_values()
        return source
    values = source if isinstance(source, Mapping) else source.model_dump(mode="json")
    return validate(schema, _overridden(from_values(values), overrides))


def _overridden(tree: Tree, overrides: Sequence[str]) -> Tree:
    for argument in overrides:
        override(tree, argument)
    return tree


def _leave_out_alternatives(schema: type[BaseModel], tree: Tree) -> None:
    """Where an override sets one of two keys that exclude each other, leave out the other one, which the file sets."""
    for name, field in schema.model_fields.items():
        one_of: Sequence[str] = getattr(field.annotation, "one_of", ())
        if not one_of or not isinstance(tree.values.get(name), dict):
            continue
        section = cast(dict[str, Any], tree.values[name])
        if any(section.get(key) is not None and tree.places.get(f"{name}.{key}") == COMMAND_LINE for key in one_of):
            for key in one_of:
                if tree.places.get(f"{name}.{key}") != COMMAND_LINE:
                    section.pop(key, None)


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
    return read_file(path).values
