"""pydantic's errors in plain words: one line for each mistake, with its place and what to do. Loads without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lodestar.config.tree import WHOLE, Tree
from lodestar.errors import LodestarError, closest, did_you_mean, shown

MAX_LISTED = 20
_MAX_READ = 200
_LISTED_KEY = 80  # characters
_INTEGER = ("be an integer", "write a whole number, as 16")
_NUMBER = ("be a number", "write a number, as 0.1")
_MAPPING = ("be a section", "write its keys below it, indented")
_LIST = ("be a list", "write it in brackets, as [a, b]")
_WORDS = {
    "int_type": _INTEGER,
    "int_from_float": _INTEGER,
    "int_parsing": _INTEGER,
    "int_parsing_size": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": ("be a finite number", "write a number, as 0.1"),
    "bool_type": ("be true or false", "write one of the two, without quotes"),
    "bool_parsing": ("be true or false", "write one of the two, without quotes"),
    "string_type": ("be a text", "write one, in quotes where it looks like something else"),
    "string_too_short": ("not be empty", "write a text, or leave the key out"),
    "string_too_long": ("have at most {max_length} characters", "shorten it"),
    "string_pattern_mismatch": ("match {pattern}", "rename it"),
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "too_short": ("have at least {min_length} {entries}", "add one"),
    "too_long": ("have at most {max_length} entries", "remove the others"),
    "missing": ("have one entry more", "add it"),  # of a tuple; that of a section is told otherwise
    "greater_than": ("be greater than {gt}", "raise it"),
    "greater_than_equal": ("be at least {ge}", "raise it"),
    "less_than": ("be less than {lt}", "lower it"),
    "less_than_equal": ("be at most {le}", "lower it"),
    "literal_error": ("be {choice}", "correct it"),
    "union_tag_invalid": ("be {choice}", "correct it"),
}
"""Kind of error -> what a value must do, and how to mend it."""


def explain(schema: type[BaseModel], tree: Tree, details: Sequence[ErrorDetails]) -> list[str]:
    """One line for each mistake, the first MAX_LISTED of them."""
    details = details[:_MAX_READ]
    misspelt = [_meant(schema, detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"]
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in details:  # a misspelt key is one mistake, though the key that was meant is missing too
        if detail["type"] != "missing" or detail["loc"] not in misspelt:
            by_key.setdefault(_key(tree, detail), []).append(detail)
    inside = {key[:length] for key in by_key for length in range(len(key))}
    lines: list[str] = []
    for key, alternatives in by_key.items():
        if key in inside and all(_is_of_type(detail) for detail in alternatives):
            continue  # the value is of another type of the union, in which there is a mistake
        reason = _reason(schema, alternatives)
        key, reason = _field_of_message(schema, tree, key, reason)
        name = ".".join(key)
        place = tree.place(name)
        name = name if len(name) <= _LISTED_KEY else f"{name[:_LISTED_KEY]}..."
        lines.append(": ".join(dict.fromkeys([place, name or WHOLE, reason])))
    lines = list(dict.fromkeys(lines))
    if lines[MAX_LISTED:]:
        lines[MAX_LISTED:] = [f"{tree.file}:1: {WHOLE}: holds more mistakes (correct those above first)"]
    return lines


def located(schema: type[BaseModel], tree: Tree, message: str) -> str:
    """A message found after loading, with the place of the key with which it, or one of its lines, begins."""
    lines: list[str] = []
    for line in message.split("\nerror: "):
        key = line.partition(": ")[0]
        is_key = re.fullmatch(r"\w+(\.\w+)*", key) and _is_key(schema, tree, key.split("."))
        lines.append(f"{tree.place(key)}: {line}" if is_key else line)
    return str(LodestarError("\nerror: ".join(lines)))  # the file's name may hold what no line should


def _key(tree: Tree, detail: ErrorDetails) -> tuple[str, ...]:
    """The YAML's keys; pydantic names the branch of a union too."""
    names = list[str]()
    loc = detail["loc"]
    for i, part in enumerate(loc):
        is_key = detail["type"] in ("missing", "extra_forbidden") and i == len(loc) - 1 and isinstance(part, str)
        if is_key or ".".join([*names, str(part)]) in tree.places:
            names.append(str(part))
    if detail["type"].startswith("union_tag"):
        names.append("kind")
    return tuple(names)


def _field_of_message(
    schema: type[BaseModel], tree: Tree, key: tuple[str, ...], reason: str
) -> tuple[tuple[str, ...], str]:
    """A section's own check begins its message with the key that is meant, if it means one."""
    first, colon, rest = reason.partition(": ")
    meant = (*key, *first.split("."))
    return (meant, rest) if colon and _is_key(schema, tree, meant) else (key, reason)


def _is_key(schema: type[BaseModel], tree: Tree, names: Sequence[str]) -> bool:
    return ".".join(names) in tree.places or names[-1] in _keys(schema, list(names[:-1]))


def _is_of_type(detail: ErrorDetails) -> bool:
    return detail["type"].endswith("_type")


def _reason(schema: type[BaseModel], alternatives: Sequence[ErrorDetails]) -> str:
    detail = alternatives[0]
    kind, loc, got = detail["type"], [str(part) for part in detail["loc"]], detail["input"]
    if kind == "extra_forbidden":
        known = _keys(schema, loc[:-1])
        return f"unknown key ({did_you_mean(loc[-1], known, 'known here: ' + ', '.join(known))})"
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(detail["loc"][-1], str)):
        return "not set (it has no default: add it)"
    if kind == "value_error":
        message = str(detail.get("ctx", {})["error"])
        return message if message.endswith(")") else f"{message} (correct it)"
    if kind == "union_tag_invalid":
        got = got["kind"]
    words = [_words(alternative) for alternative in alternatives]
    remedy = "write a value; ~ and nothing at all stand for none" if got is None else words[0][1]
    must = " or ".join(dict.fromkeys(phrase for phrase, _ in words)).replace(" or be ", " or ")
    return f"must {must}, got {shown(got)} ({remedy})"


def _words(detail: ErrorDetails) -> tuple[str, str]:
    """What the value must do, and how to mend it."""
    context = {
        key: f"{value:,.12g}" if isinstance(value, int | float) else value
        for key, value in detail.get("ctx", {}).items()
    }
    choices = [name.strip(" '") for name in str(context.get("expected") or context.get("expected_tags", "")).replace(
        " or ", ", ").replace("False", "false").split(",")]  # fmt: skip
    context["choice"] = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    context["entries"] = "entry" if context.get("min_length") == "1" else "entries"
    otherwise = detail["msg"][:1].lower() + detail["msg"][1:]
    phrase, remedy = _WORDS.get(detail["type"], (otherwise.removeprefix("input should "), "correct it"))
    return phrase.format(**context) if detail["type"] in _WORDS else phrase, remedy


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
