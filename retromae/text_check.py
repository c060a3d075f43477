"""The check of a row of pre-training: it has a text. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lodestar.data.findings import Findings
from lodestar.data.readers import Row
from lodestar.errors import DataError, names


@dataclass(frozen=True)
class TextCheck:
    """Row -> its text; none to drop a row whose text is empty. Raises DataError where `field` is no text."""

    field: str

    def __call__(self, where: str, row: Row, findings: Findings | None = None) -> Row | None:
        text = row.get(self.field)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {self.field}: must be a text, got {type(text).__name__} (set data.field; here: {names(row)})"
            )
        return {"text": text} if text.strip() else None
