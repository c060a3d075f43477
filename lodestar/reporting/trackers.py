"""metrics.jsonl, and accelerate's trackers beside it; the only file that knows trackers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from pydantic import BaseModel

from lodestar.config import loader
from lodestar.config.schema import TrackConfig
from lodestar.errors import ConfigError, first_line
from lodestar.files import NO_SUCH_FILE, file_problem, write_text

METRICS = "metrics.jsonl"
WANDB_SECONDS = 8.0
"""How long the start of a run waits for wandb."""


class Tracker:
    """Writes the metrics of a run; on all ranks but rank 0 it does nothing."""

    def __init__(self, path: Path | None, trackers: list[GeneralTracker]) -> None:
        self._path, self._trackers = path, trackers
        self._size = 0
        """Bytes before the last line that was written, or that a full disk cut."""
        self._unwritten = ""
        """Lines that did not go onto a full disk."""

    @classmethod
    def silent(cls) -> Tracker:
        """A tracker that does nothing, for ranks other than rank 0."""
        return cls(None, [])

    @classmethod
    def open(
        cls, output_dir: Path, track: TrackConfig, run_name: str, recipe: BaseModel, env: Mapping[str, str]
    ) -> Tracker:
        """Start the trackers, which write below `output_dir`; wandb is offline where `env` has neither mode nor key."""
        path = output_dir / METRICS
        if (problem := file_problem(path)) not in (None, NO_SUCH_FILE):
            raise ConfigError(f"run.output_dir: {path}: {problem} (move it away)")
        trackers = [_start(name, output_dir, track, run_name, env) for name in track.to]
        for tracker in trackers:
            tracker.store_init_configuration(_plain_values(recipe))
        return cls(path, trackers)

    def resume_at(self, step: int) -> None:
        """Delete lines after `step`, which the resumed run writes again, and damaged ones, with a warning."""
        if self._path is not None and self._path.is_file():
            lines, damaged = _read(self._path)
            if damaged:
                more = f" and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
                print(
                    f"warning: {self._path}:{damaged[0]}: line{more}: damaged: dropped (nothing to do: others stay)",
                    file=sys.stderr,
                    flush=True,
                )
            write_text(self._path, "".join(_line(values) for values in lines if values["step"] <= step))

    def log(self, values: Mapping[str, Any]) -> None:
        """Write a line; numbers go to the trackers too. A number that is not finite becomes null."""
        if self._path is None:
            return
        self._append(self._path, _line(values))
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=values["step"])

    def _append(self, path: Path, line: str) -> None:
        """Write the line, and those that could not be written before; a full disk is told once, not an end."""
        was_told, self._unwritten = bool(self._unwritten), self._unwritten + line
        content = self._unwritten.encode()
        try:
            with open(path, "ab") as file:
                if was_told:
                    file.truncate(min(self._size, file.tell()))
                else:
                    self._size = file.tell()
                file.write(content)
        except OSError as error:
            if not was_told:
                print(
                    f"warning: {path}: {error.strerror}: training goes on, and writes its metrics later (make room "
                    "there)",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._unwritten = ""

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without damaged ones and without a last one that a killed run left incomplete."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(lines, numbers of the damaged lines, from 1)."""
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and type(values.get("step")) is int:
            lines.append(values)
        elif number < len(texts):
            damaged.append(number)
    return lines, damaged


def _line(values: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _plain_values(recipe: BaseModel) -> dict[str, Any]:
    """Dotted keys with plain values, as trackers need them."""
    values = loader.flat(recipe).items()
    return {key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value) for key, value in values}


def _start(name: str, output_dir: Path, track: TrackConfig, run_name: str, env: Mapping[str, str]) -> GeneralTracker:
    PartialState()  # accelerate's logger needs it; it uses the existing process group
    if name == "tensorboard":
        tracker: GeneralTracker = TensorBoardTracker(run_name, logging_dir=str(output_dir / "tensorboard"))
    else:
        return _start_wandb(output_dir, track, run_name, env)
    tracker.start()
    return tracker


def _start_wandb(output_dir: Path, track: TrackConfig, run_name: str, env: Mapping[str, str]) -> GeneralTracker:
    """Offline where it is not configured, or cannot be reached now: training does not wait for it."""

    def start(**mode: str) -> GeneralTracker:
        settings = {"init_timeout": WANDB_SECONDS}
        tracker = WandBTracker(track.project, name=run_name, dir=str(output_dir), settings=settings, **mode)
        tracker.start()
        return tracker

    is_configured = "WANDB_MODE" in env or "WANDB_API_KEY" in env
    if not is_configured:
        return start(mode="offline")
    try:
        return start()
    except Exception as error:  # wandb's errors have no common class; the library is accelerate's to import
        print(
            f"warning: track.to: wandb cannot be reached: {first_line(error)} (the run goes on, with its metrics in "
            f"{output_dir}/wandb: wandb sync them later)",
            file=sys.stderr,
            flush=True,
        )
        return start(mode="offline")
