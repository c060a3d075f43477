"""A recipe's file, overrides and Python's values as one tree: plain values, and the place of each.

Loads without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

from lodestar import secrets
from lodestar.commands import recipes_folder
from lodestar.errors import ConfigError, first_line, shown
from lodestar.files import NO_SUCH_FILE, file_problem, open_regular

COMMAND_LINE = "command line"
WHOLE = IN_PYTHON = "recipe"
"""In a message, the field of a mistake of the whole, and the place of one in a recipe that is no file."""
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_SIZE = 4 * MAX_BYTES
"""Of all values, once aliases are replaced by what they name: characters, and _VALUE_SIZE for each value."""
_VALUE_SIZE, _MAX_KEY, _MAX_DIGITS = 128, 200, 40
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML does not allow in a file."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_YAML_REMEDIES = {
    "mapping values are not allowed": "quote a text that holds ': ', and indent the keys of a section alike",
    "cannot start any token": "quote a text that begins with this character; indent by spaces, not tabs",
    "could not find expected ':'": "write KEY: VALUE",
    "escape code": "write the character itself",
    "tag": "remove the tag: a recipe holds plain values only",
}
"""Part of the parser's message -> what to do."""
Where = Callable[[int], str]
"""A line of YAML -> the place that a message names."""


@dataclass
class Tree:
    """Plain values, and FILE:LINE for each dotted key."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[str, str] = field(default_factory=dict[str, str])
    file: str = IN_PYTHON

    def place(self, key: str) -> str:
        """Where a key stands; of one that is not set, where its section does."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.file)

    def check_values(self) -> None:
        """ConfigError for what no field may hold: text that is none, numbers without end, secrets."""
        lines = [f"{self.places.get(key, IN_PYTHON)}: {key}: {problem}" for key, value in _leaves(self.values, "") if
                 (problem := _problem(key, value))]  # fmt: skip
        if lines:
            raise ConfigError("\nerror: ".join(lines[:20]))


def read_file(path: Path) -> Tree:
    """The tree of a YAML file; ConfigError where it is not valid YAML, or more than a recipe may hold."""
    text = _text(path)

    def where(line: int) -> str:
        return f"{path}:{line}"

    def mistake(line: int, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"{where(line)}: {WHOLE}: {problem} ({remedy})")

    if unprintable := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, unprintable.start()) + 1
        raise mistake(line, f"holds the character U+{ord(unprintable[0]):04X}", "remove it")
    try:
        node = _compose(text, where)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or error.context or "no YAML"
        remedy = next((todo for part, todo in _YAML_REMEDIES.items() if part in problem), "check quotes and brackets")
        raise mistake(line, f"not valid YAML: {problem}", remedy) from None
    except yaml.YAMLError as error:
        raise mistake(1, f"not valid YAML: {first_line(error)}", "check quotes and brackets") from None
    if not isinstance(node, yaml.MappingNode):
        got = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a value"
        raise mistake(1, f"must be a mapping of sections, got {got}", "as `optim:` with `lr: 1e-5` below it")
    tree = Tree(file=str(path))
    tree.values = _Expansion(where, tree.places).value(node, "")
    return tree


def from_values(values: Mapping[str, object]) -> Tree:
    """The tree of a recipe's values; sections become mappings, and paths texts."""
    tree = Tree()
    tree.values = _plain(values, "", tree.places)
    return tree


def override(tree: Tree, argument: str) -> None:
    """Lay `KEY=VALUE` on the tree. Text that begins like a list, a mapping or a quotation is read as YAML."""
    key, equals, text = argument.partition("=")
    *parents, last = names = key.split(".")
    if not equals or not all(names) or len(names) > MAX_DEPTH or len(key) > _MAX_KEY:
        raise ConfigError(f"{COMMAND_LINE}: {_short(argument)}: not an override (write KEY=VALUE, as optim.lr=1e-5)")
    place = f"{COMMAND_LINE}: {key}"
    try:
        node = _compose(text, lambda _: place) if text.startswith(("[", "{", '"', "'")) else None
    except (yaml.YAMLError, UnicodeError):
        raise ConfigError(f"{place}: cannot read the value {shown(text)} (quote it)") from None
    section: Any = tree.values
    for depth, parent in enumerate(parents, 1):
        path = ".".join(parents[:depth])
        tree.places.setdefault(path, COMMAND_LINE)
        if not isinstance(section.get(parent), dict):
            if parent in section:
                raise ConfigError(f"{place}: {parent} is not a section (write {path}=VALUE)")
            section[parent] = {}
        section = section[parent]
    tree.places = {path: at for path, at in tree.places.items() if path != key and not path.startswith(f"{key}.")}
    tree.places[key] = COMMAND_LINE
    section[last] = _Expansion(lambda _: COMMAND_LINE, tree.places).value(node, key) if node else _scalar(text)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All keys, with their values: those of sections and lists as well as those in them."""
    yield path, value
    if isinstance(value, list):
        value = dict(enumerate(cast(list[Any], value)))
    if isinstance(value, dict):
        for key, inner in cast(dict[Any, Any], value).items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def _problem(key: str, value: Any) -> str | None:
    for text in (key, value) if isinstance(value, str) else (key,):
        if character := _NO_TEXT.search(text):
            name = "a NUL character" if character[0] == "\0" else "half of a surrogate pair, which is no character"
            return f"holds {name} (remove it)"
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        return f"is a number of more than {_MAX_DIGITS} digits (write a smaller one)"
    return secrets.refusal(key, value)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- files -----------------------------------------------------------------------------------


def _text(path: Path) -> str:
    problem = file_problem(path)
    if problem == NO_SUCH_FILE:
        shipped = recipes_folder() / f"{path}.yaml"
        remedy = f"lodestar recipes {path} > my.yaml copies it" if shipped.is_file() else "name a YAML file"
        raise ConfigError(f"{path}:1: {WHOLE}: no such file ({remedy}; lodestar recipes lists those that come along)")
    if problem:
        raise ConfigError(f"{path}:1: {WHOLE}: {problem} (name a YAML file)")
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}:1: {WHOLE}: cannot be read: {error.strerror} (name a file that can)") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}:1: {WHOLE}: more than {MAX_BYTES:,} bytes (name the recipe, not a file of data)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}:1: {WHOLE}: is UTF-16 (save it as UTF-8)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: {WHOLE}: is not UTF-8: byte 0x{content[error.start]:02X} (save it as UTF-8)"
        ) from None


# --- YAML ------------------------------------------------------------------------------------


def _compose(text: str, where: Where) -> yaml.Node | None:
    """The nodes of one document, aliases resolved; ConfigError for tags, a second document and bottomless nesting."""
    events = _bounded(yaml.parse(text, Loader=_LOADER), where)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    anchors: dict[str, yaml.Node | None] = {}

    def compose(event: Any, depth: int) -> yaml.Node:
        place = where(event.start_mark.line + 1)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: {WHOLE}: nested deeper than {MAX_DEPTH} levels (a recipe needs five)")
        if isinstance(event, yaml.AliasEvent):
            node = anchors.get(event.anchor)
            if node is None:
                problem = "an alias of itself" if event.anchor in anchors else "no such anchor above"
                raise ConfigError(f"{place}: {WHOLE}: *{_short(event.anchor)}: {problem} (write the value out)")
            return node
        if event.anchor:
            anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = yaml.ScalarNode(event.tag, event.value, event.start_mark, event.end_mark, event.style)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = yaml.SequenceNode(event.tag, [], event.start_mark, event.end_mark)
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                node.value.append(compose(item, depth + 1))
        else:
            node = yaml.MappingNode(event.tag, [], event.start_mark, event.end_mark)
            while not isinstance(key := next(events), yaml.MappingEndEvent):
                node.value.append((compose(key, depth + 1), compose(next(events), depth + 1)))
        if event.anchor:
            anchors[event.anchor] = node
        return node

    root = None
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            root = compose(event, 1)
        elif isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise ConfigError(f"{where(event.start_mark.line + 1)}: {WHOLE}: a second document (remove `---`)")
    return root


def _bounded(events: Iterable[Any], where: Where) -> Iterator[Any]:
    for count, event in enumerate(events):
        if count * _VALUE_SIZE > 2 * MAX_SIZE:  # a section, or list, is two events
            place = where(event.start_mark.line + 1)
            raise ConfigError(f"{place}: {WHOLE}: holds too many values for a recipe (name a folder or a glob)")
        yield event


@dataclass
class _Expansion:
    """Nodes -> plain values. Scalars have the types of YAML 1.2."""

    where: Where
    places: dict[str, str]
    size: int = 0

    def value(self, node: yaml.Node, path: str, depth: int = 1) -> Any:
        line: int = node.start_mark.line + 1
        place = self.places.setdefault(path, self.where(line))
        at = f"{place}: {path or WHOLE}"
        self.size += _VALUE_SIZE + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self.size > MAX_SIZE or depth > MAX_DEPTH:
            raise ConfigError(f"{at}: too much for a recipe, once aliases are replaced (write the values out)")
        if tag := _tag(node):
            raise ConfigError(f"{at}: tag {tag}: a recipe holds plain values only (remove the tag)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}.{i}", depth + 1) for i, item in enumerate(node.value)]
        text, style = cast(yaml.ScalarNode, node).value, cast(yaml.ScalarNode, node).style
        return text if style else _scalar(text)  # a style: quoted or block text

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            place = self.where(key_node.start_mark.line + 1)
            at = f"{place}: {path or WHOLE}"
            if not isinstance(key_node, yaml.ScalarNode) or _tag(key_node):
                raise ConfigError(f"{at}: a key must be a plain word (write KEY: VALUE)")
            key = str(key_node.value)
            if key == "<<":
                raise ConfigError(f"{at}: merge keys (<<) are not read (write the keys out)")
            if not key or len(key) > _MAX_KEY:
                raise ConfigError(f"{at}: a key of {len(key):,} characters (write KEY: VALUE)")
            name = f"{path}.{key}" if path else key
            if key in result:
                first = self.places[name].rpartition(":")[2]
                told = f"on line {first}" if first.isdigit() else "above"
                raise ConfigError(f"{place}: {name}: already set {told} (keep one of the two)")
            self.places[name] = place
            result[key] = self.value(value_node, name, depth + 1)
        return result


_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _tag(node: yaml.Node) -> str:
    """As it is written, shortened; empty where there is none."""
    return _short((node.tag or "").replace("tag:yaml.org,2002:", "!!"))


def _scalar(text: str) -> str | int | float | bool | None:
    """YAML 1.2's core types: `1e-5` is a number, `on` and `12:30:00` are text (YAML 1.1 reads all three otherwise)."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text):  # Python reads up to 4,300 digits; so many are refused whatever they are
        return int(text.replace("_", "")) if len(text) <= 1000 else 10**1000
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"_|\.(?=[in])", "", text.lower()))
    return text


# --- Python ----------------------------------------------------------------------------------


def _plain(value: Any, path: str, places: dict[str, str], depth: int = 1) -> Any:
    places[path] = IN_PYTHON
    at = f"{IN_PYTHON}: {path}" if path else IN_PYTHON
    if depth > MAX_DEPTH:
        raise ConfigError(f"{at}: nested deeper than {MAX_DEPTH} levels (a recipe needs five)")
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        if bad := [key for key, _ in items if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY]:
            raise ConfigError(f"{at}: the key {shown(bad[0])} is no name (write it as a short text)")
        return {key: _plain(inner, f"{path}.{key}" if path else key, places, depth + 1) for key, inner in items}
    if isinstance(value, list | tuple):
        sequence = cast(list[Any], value)
        return [_plain(inner, f"{path}.{i}", places, depth + 1) for i, inner in enumerate(sequence)]
    return value if value is None or isinstance(value, str | int | float) else str(value)
