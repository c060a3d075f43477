"""Crashes at the same step, run after run: the third is the last, and its examples are named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lodestar.data.readers import Row, Source, read_rows
from lodestar.errors import LodestarError, PeerLostError, TrainingError
from lodestar.files import read_object
from lodestar.training.loop import Progress, StepDone

RECORD, EXAMPLES = "attempt.json", "crashed-batch.txt"
MOST_CRASHES = 3
_LENGTH = 256
"""Bytes of the record, which is overwritten in place after each step."""


class CrashLoopHook:
    """Records on rank 0 the step that a run is in, so that one that dies there again and again is not started again.

    An end by a signal, by an error that a user can mend, or by the last step deletes the record.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        """settings   JSON values of which a change makes a crash another one: the recipe, the world size"""
        self._path, self._file = folder / RECORD, -1
        self._settings = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.step, self.crashes = self._earlier()

    def _earlier(self) -> tuple[int, int]:
        """(step in which the earlier runs ended, how many of them ended there in a row)."""
        try:
            record = read_object(self._path)
            step, last, crashes = (int(record[name]) for name in ("step", "last", "crashes"))
        except (ValueError, KeyError, TypeError):
            return -1, 0
        if record.get("settings") != self._settings:
            return -1, 0
        return step, crashes + 1 if step == last else 1

    def check(self, total_steps: int, examples_at: Callable[[int], Sequence[str]] | None) -> None:
        """TrainingError where this run would be the fourth to die in the same step."""
        if self.crashes < MOST_CRASHES:
            return
        batch, listed = "", ""
        if examples_at is not None and self.step < total_steps:
            examples = examples_at(self.step)
            batch = " with the examples " + ", ".join([*examples[:12], *(["..."] if examples[12:] else [])])
            with suppress(OSError):
                self._path.with_name(EXAMPLES).write_text("\n".join([*examples, ""]), encoding="utf-8")
                listed = f"; {self._path.with_name(EXAMPLES)} lists all"
        place = f"step {self.step + 1}" if self.step < total_steps else "the end of the run"
        raise TrainingError(
            f"run.output_dir: {self._path.parent}: crashed {self.crashes} times in a row in {place}{batch} (mend or "
            "drop the example at fault, or change what ran out, as by a smaller batch.micro_tokens; to try again, "
            f"delete {self._path}{listed})"
        )

    def __enter__(self) -> CrashLoopHook:
        return self

    def before(self, progress: Progress) -> None:
        with suppress(OSError):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._record(progress.step)

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        self._record(progress.step)

    def after(self, progress: Progress) -> None: ...

    def _record(self, step: int) -> None:
        values = {"step": step, "last": self.step, "crashes": self.crashes, "settings": self._settings}
        with suppress(OSError):  # a full disk: the next crash is not counted
            os.pwrite(self._file, json.dumps(values).ljust(_LENGTH).encode(), 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
        is_crash = error is not None and not isinstance(error, (LodestarError, KeyboardInterrupt))
        if not is_crash and not isinstance(error, PeerLostError):
            self._path.unlink(missing_ok=True)


def places(
    sources: Sequence[Source], check: Callable[[str, Row], Row | None], rows: Collection[int]
) -> tuple[dict[int, str], int]:
    """(FILE:LINE of some of the rows that `check` keeps, number of all that it keeps)."""
    found, count = dict[int, str](), 0
    for source in sources:
        for where, row in read_rows(source):
            if check(where, row) is not None:
                if count in rows:
                    found[count] = where
                count += 1
    return found, count
