"""The types of a recipe's values, with the bounds beyond which a value is nonsense. Loads without torch."""

from __future__ import annotations

import os.path
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from lodestar.errors import shown

LARGEST = 10**9
"""Of a count, as of steps, examples or rows."""
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""A fraction that must not be 1, as a dropout rate or the decay of a moving average."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Of an embedding."""
Processes = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _short_text(pattern: str, characters: str) -> AfterValidator:
    """Of up to 100 bytes; `characters` says in a message what the pattern allows."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text) or len(text.encode()) > 100:
            raise ValueError(
                f"must consist of {characters}, not begin with '.', and have at most 100 bytes, got {shown(text)} "
                "(rename it)"
            )
        return text

    return AfterValidator(check)


def _check_path(path: str) -> str:
    expanded = os.path.expanduser(path)
    if not path.strip():
        raise ValueError("must not be empty (name a path, as runs/first)")
    if path.startswith("~") and (expanded == path or "/" not in path):
        raise ValueError(f"no folder {shown(path)} (name one in your home folder, as ~/runs)")
    return expanded


Name = Annotated[str, _short_text(r"[\w-][\w.-]*", "letters, digits, '_', '-' and '.'")]
"""What becomes the name of a file or of a run."""
Label = Annotated[str, _short_text(r"[\w(+-][\w .,()+-]*", "letters, digits, spaces and any of _-.,()+")]
"""What is shown beside results."""
Location = Annotated[str, AfterValidator(_check_path)]
"""A file, folder, glob or hub name; a leading `~/` is the home folder."""
