"""Lines of text files, gz or not. A line is bounded, a file is never waited for, and every error names FILE:LINE.

Loads without torch.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lodestar.errors import DataError, first_line
from lodestar.files import open_regular

MAX_LINE_CHARACTERS = 16 << 20
"""A longer line is an error: it is no text, and would fill the memory."""

_GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
_FOREIGN_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


OnError = Callable[[DataError], None]
"""Gets the error of a line or row, which is then left out."""


def fail(error: DataError) -> None:
    """The usual OnError: nothing is read after an error."""
    raise error from None


class Place(NamedTuple):
    """Between two lines of a file."""

    line: int = 0
    """Lines before it."""
    offset: int = 0
    """Bytes before it, of a gz file's content."""


def read_lines(path: str | Path, on_error: OnError = fail) -> Iterator[tuple[int, str]]:
    """(number from 1, line) for each line that is not blank, gz or not; DataError where the file cannot be read."""
    return ((place.line, line) for place, line in read_lines_from(path, Place(), on_error))


def read_lines_from(path: str | Path, start: Place, on_error: OnError = fail) -> Iterator[tuple[Place, str]]:
    """As `read_lines` from a place that an earlier call gave: (place after the line, line). What is before is not read,
    except of a gz file.
    """
    number, offset = start
    try:
        with open_regular(path) as raw:
            is_gz = str(path).endswith(".gz")
            _check_kind(path, raw, is_gz)
            binary = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gz else raw
            offset = offset or _skip_bom(path, binary)
            binary.seek(offset)
            # Lines keep their ends, so that their bytes can be counted.
            with io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="") as file:
                while line := file.readline(MAX_LINE_CHARACTERS):
                    number += 1
                    offset += _num_bytes(line)
                    if problem := _problem(line):
                        on_error(DataError(f"{path}:{number}: row: {problem}"))
                        while len(line) == MAX_LINE_CHARACTERS and not line.endswith("\n"):
                            line = file.readline(MAX_LINE_CHARACTERS)
                            offset += _num_bytes(line)
                    elif not line.isspace():
                        yield Place(number, offset), line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}:{number + 1}: row: the gz file is cut or damaged (fetch it again)") from None
    except OSError as error:
        problem = error.strerror or first_line(error)
        raise DataError(f"{path}:{number + 1}: row: cannot be read: {problem} (fetch the file again)") from None


def _num_bytes(line: str) -> int:
    return len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))


def _check_kind(path: str | Path, file: BinaryIO, is_gz: bool) -> None:
    """DataError where the name and the content disagree on gz."""
    start = file.read(2)
    file.seek(0)
    if is_gz and start != _GZIP and start:
        raise DataError(f"{path}:1: row: is no gz file (take .gz off its name, or fetch it again)")
    if not is_gz and start == _GZIP:
        raise DataError(f"{path}:1: row: is a gz file (add .gz to its name)")


def _skip_bom(path: str | Path, file: BinaryIO) -> int:
    """The bytes of a byte order mark; DataError for one of another encoding."""
    start = cast(io.BufferedReader, file).peek(4)[:4]
    for bom, encoding in _FOREIGN_BOMS.items():
        if start.startswith(bom):
            raise DataError(f"{path}:1: row: is {encoding} (convert the file to UTF-8)")
    return len(_BOM) if start.startswith(_BOM) else 0


def _problem(line: str) -> str | None:
    """What is wrong with a line, with the remedy."""
    if len(line) == MAX_LINE_CHARACTERS and not line.endswith("\n"):
        return f"longer than {MAX_LINE_CHARACTERS:,} characters (one row on each line; split long texts)"
    if "\0" in line:
        return "holds a NUL byte (convert the file to UTF-8, or drop the row)"
    if not line.isascii() and not is_encodable(line):
        return "not valid UTF-8 (convert the file to UTF-8)"
    return None


def is_encodable(text: str) -> bool:
    """False for a text with a lone surrogate: half a character, or a byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
