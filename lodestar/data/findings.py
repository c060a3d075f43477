"""What is odd in the rows of training data but may be meant: counted, told once for each kind, an error where strict.

Loads without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from lodestar.data.readers import Source, repeated
from lodestar.errors import DataError

MAX_KINDS = 100
"""Further kinds are not counted: they are names of fields, and a damaged file may hold any number of them."""


class Finding(TypedDict):
    where: str
    """FILE:LINE of the first."""
    field: str
    remedy: str
    count: int


@dataclass
class Findings:
    """Findings by what is wrong."""

    strict: bool = False
    """Raise DataError at the first one."""
    by_problem: dict[str, Finding] = field(default_factory=dict[str, Finding])

    def add(self, where: str, field: str, problem: str, remedy: str, count: int = 1) -> None:
        """Count one more; `problem` is the same text for all of its kind. DataError where strict."""
        if self.strict:
            raise DataError(f"{where}: {field}: {problem} ({remedy}, or set data.strict: false)")
        if problem in self.by_problem:
            self.by_problem[problem]["count"] += count
        elif len(self.by_problem) < MAX_KINDS:
            self.by_problem[problem] = Finding(where=where, field=field, remedy=remedy, count=count)

    def add_empty(self, source: Source) -> None:
        """A file without a row."""
        self.add(f"{source.path}:1", "row", "a file is empty", "fill it, or take it out of the recipe")

    def add_repeated(self, sources: Sequence[Source]) -> None:
        """Files that are named more than once."""
        for path in repeated(sources):
            self.add(sources[0].field, path, "a file is named more than once", "name it once")

    def merge(self, by_problem: Mapping[str, Finding]) -> None:
        """Add what was found earlier in the same rows."""
        for problem, finding in by_problem.items():
            self.add(finding["where"], finding["field"], problem, finding["remedy"], finding["count"])

    @property
    def warnings(self) -> list[str]:
        """One line for each kind, with its first place and its count."""
        return [
            f"warning: {one['where']}: {one['field']}: {problem}; {one['count']:,} so ({one['remedy']})"
            for problem, one in self.by_problem.items()
        ]

    def print(self) -> None:
        """The warnings, on stderr."""
        if warnings := self.warnings:
            print(*warnings, sep="\n", file=sys.stderr, flush=True)
