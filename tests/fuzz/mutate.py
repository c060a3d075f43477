"""Seeded mutations of bytes and of JSON values, and what every reader of them must do."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from lodestar.errors import LodestarError

MESSAGE = re.compile(r"[^\n]+: [^\n]+ \([^\n]+\)")
"""The place and field, what is wrong, and in parentheses what to do; one line."""
LIMIT_S = 2  # of processor time: the machine may have other work

ODD_VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 4, 1e308, float("nan"), float("inf"), -float("inf"), 10**400, "", " ", "\0", "\u2028",
    "\ud800", "é" * 50, "x" * 10_000, [], [[]], [None], ["a", 4], {}, {"a": {"b": [1]}}, "${HOME}", "../x", "<script>",
)  # fmt: skip
"""What a field may hold by mistake."""
ODD_BYTES = (
    b"\0", b"\n", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\xed\xa0\x80", b"\\ud800", b"\\uDFFF", b'"', b"{",
    b"}", b"[", b",", b":", b"NaN", b"Infinity", b"-1e999", b"9" * 5000, b"[" * 2000, b"\\", b"\t", b"\x1f\x8b", b"!!",
    b"&a [*a]", b"0x1F", b"1e5", b"~", b"# ",
)  # fmt: skip


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four damages: a byte or a bit changed, a part cut, doubled, moved or overwritten by something odd."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 4, 30, 200)))
        part = content[start:end]
        odd = rng.choice(ODD_BYTES)
        content = rng.choice(
            (
                content[:start] + bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:1]) + content[start + 1 :],
                content[:start] + content[end:],
                content[:start],
                content[:start] + part + part + content[end:],
                content[:start] + odd + content[start:],
                content[:start] + odd + content[end:],
            )
        )
    return content


def mutate_value(value: Any, rng: random.Random, names: Sequence[str] = ()) -> Any:
    """The JSON value with one place changed: replaced, left out, doubled, renamed, or of another type.

    names   for keys that are renamed
    """
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.randrange(5)
        if action == 0:
            return {name: one for name, one in value.items() if name != key}
        if action == 1:
            new = rng.choice([*names, key[:-1], f"{key}s", key.upper(), f"{key}\n", ""])
            return {new if name == key else name: one for name, one in value.items()}
        if action == 2:
            return {**value, rng.choice([*names, "odd"]): rng.choice(ODD_VALUES)}
        return {**value, key: mutate_value(value[key], rng, names)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], mutate_value(value[index], rng, names), *value[index + rng.randrange(2) :]]
    return rng.choice([*ODD_VALUES, str(value), [value], {"value": value}])


def as_line(value: Any) -> bytes:
    """A line of JSONL; lone surrogates and NaN are written as Python writes them."""
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


def refused(read: Callable[[], object], case: object) -> bool:
    """Whether `read` refuses it; AssertionError for another exception, a long time or a message of another form."""
    start, lines = time.process_time(), []
    try:
        read()
    except LodestarError as error:
        lines = str(error).split("\nerror: ")
    except Exception as error:
        raise AssertionError(f"{case!r}: {error!r}") from error
    for line in lines:
        assert MESSAGE.fullmatch(line), f"{case!r}: {line!r}"
    assert time.process_time() - start < LIMIT_S, case
    return bool(lines)
