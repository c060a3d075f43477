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
from lodestar.errors import first_line
from lodestar.files import write_text

METRICS = "metrics.jsonl"
WANDB_SECONDS = 8.0
"""How long the start of a run waits for wandb."""


class Tracker:
    """Writes the metrics of a run; on all ranks but rank 0 it does nothing."""

    def __init__(self, path: Path | None, trackers: list[GeneralTracker]) -> None:
        self._path, self._trackers = path, trackers

    @classmethod
    def silent(cls) -> Tracker:
        """A tracker that does nothing, for ranks other than rank 0."""
        return cls(None, [])

    @classmethod
    def open(
        cls, output_dir: Path, track: TrackConfig, run_name: str, recipe: BaseModel, env: Mapping[str, str]
    ) -> Tracker:
        """Start the trackers, which write below `output_dir`; wandb is offline where `env` has neither mode nor key."""
        trackers = [_start(name, output_dir, track, run_name, env) for name in track.to]
        for tracker in trackers:
            tracker.store_init_configuration(_plain_values(recipe))
        return cls(output_dir / METRICS, trackers)

    def resume_at(self, step: int) -> None:
        """Delete lines after `step`, and an incomplete last line: the resumed run writes them again."""
        if self._path is not None and self._path.is_file():
            lines = [line for line in read_metrics(self._path) if line["step"] <= step]
            write_text(self._path, "".join(_line(values) for values in lines))

    def log(self, values: Mapping[str, Any]) -> None:
        """Write a line; numbers go to the trackers too. A number that is not finite becomes null."""
        if self._path is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(values))
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=values["step"])

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without an incomplete line that a killed run left."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
