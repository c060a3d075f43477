"""Saves run beside the steps: one at a time, of the tensors as they were, and the run waits for the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lodestar.config.schema import CheckpointConfig
from lodestar.errors import TrainingError
from lodestar.training import checkpoint
from lodestar.training.checkpoint_hook import CheckpointHook
from lodestar.training.engine import StepReport
from lodestar.training.host_memory import HostMemory
from lodestar.training.loop import Progress, fit

LIMIT_SECONDS = 20.0


class Engine:
    """Adds 1 to its weights in place in each step."""

    def __init__(self) -> None:
        self.module = nn.Linear(3, 2)
        self.parameters = dict(self.module.named_parameters())
        for parameter in self.parameters.values():
            nn.init.zeros_(parameter)

    def step(self, lr_factor: float) -> StepReport:
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += 1
        return StepReport(torch.ones(()), torch.zeros(()))

    def weights(self, memory: HostMemory) -> dict[str, Tensor]:
        return memory.copy("weights", self.parameters)

    def optimizer_state(self, memory: HostMemory) -> dict[str, Tensor]:
        return memory.copy("optimizer", {f"{name}:exp_avg": p for name, p in self.parameters.items()})

    def values(self) -> dict[str, float]:
        return {}


class Stage:
    def backward(self, batch: Any, engine: Any, step: int) -> dict[str, Tensor]:
        return {}


class Run:
    """A run of 6 steps with a save every 2, whose writes wait until they may go on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, timeout_minutes: float = 1.0) -> None:
        self.folder, self.progress = folder, Progress(6)
        self.may_write, self.requests = threading.Event(), list[str]()
        self.log: list[tuple[str, int]] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self._write, self._timeout_minutes = checkpoint.write, timeout_minutes
        self.broken_at: tuple[int, ...] = ()
        monkeypatch.setattr(checkpoint, "write", self.write)

    def write(self, directory: Path, step: int, **values: Any) -> Path:
        self.log.append(("write", step))
        assert self.may_write.wait(LIMIT_SECONDS)
        if step in self.broken_at:
            raise OSError(28, "No space left on device")
        folder = self._write(directory, step, **values)
        self.log.append(("written", step))
        return folder

    def go(self) -> None:
        engine: Any = Engine()
        with ThreadPoolExecutor(1) as writer:
            saving = CheckpointHook(
                engine,
                self.folder,
                CheckpointConfig(every_steps=2, keep=9),
                {},
                writer=writer,
                hashed={},
                is_main=True,
                request_stop=self.requests.append,
                timeout_minutes=self._timeout_minutes,
            )
            fit(
                Stage(), engine, iter([None] * 6), progress=self.progress, lr_factor_at=lambda step: 1.0,
                hooks=[saving, self],
            )  # fmt: skip

    def before(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress, done: Any) -> None:
        self.log.append(("step", progress.step))
        self.on_step(progress.step)

    def after(self, progress: Progress) -> None:
        self.log.append(("end", progress.step))

    def until(self, entry: tuple[str, int]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while entry not in self.log:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.001)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(tmp_path, monkeypatch)
    yield run
    run.may_write.set()


def test_steps_go_on_while_a_save_is_written_and_it_holds_what_was_copied(run: Run) -> None:
    run.on_step = lambda step: run.may_write.set() if step == 3 else None
    run.go()
    assert run.log.index(("step", 3)) < run.log.index(("written", 2)) < run.log.index(("write", 4))
    assert run.log[-2:] == [("written", 6), ("end", 6)]
    for step in (2, 4, 6):
        tensors, values = checkpoint.read(run.folder / f"step-{step:08d}")
        assert values["step"] == step
        assert all(tensor.eq(step).all() for group in tensors.values() for tensor in group.values())


def test_a_stopped_run_ends_when_its_last_save_is_on_the_disk(run: Run) -> None:
    def stop(step: int) -> None:
        if step == 3:
            run.progress.stop = "SIGTERM"
            threading.Timer(0.2, run.may_write.set).start()

    run.on_step = stop
    run.go()
    assert checkpoint.steps(run.folder) == [2, 3] and run.log[-2:] == [("written", 3), ("end", 3)]


def test_an_error_in_training_does_not_lose_the_save_in_flight(run: Run) -> None:
    def fail(step: int) -> None:
        if step == 3:
            threading.Timer(0.2, run.may_write.set).start()
            raise TrainingError("not finite")

    run.on_step = fail
    with pytest.raises(TrainingError, match="not finite"):
        run.go()
    assert checkpoint.steps(run.folder) == [2]


def test_a_failed_save_is_told_at_the_next_step_and_the_next_one_may_succeed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said: dict[int, str] = {}

    def after_step(step: int) -> None:
        if step == 2:
            run.until(("write", 2))
            time.sleep(0.1)  # until it has failed
        said[step] = capsys.readouterr().err

    run.on_step, run.broken_at = after_step, (2,)
    run.may_write.set()
    run.go()
    assert not said[2] and "step 2: No space left on device: not saved; training goes on" in said[3]
    assert not said[4] and checkpoint.steps(run.folder) == [4, 6] and not run.requests


def test_three_failed_saves_in_a_row_stop_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.broken_at = (2, 4, 6)
    run.may_write.set()
    with pytest.raises(TrainingError, match=r"step 6: .*: not saved 3 times in a row"):
        run.go()
    assert capsys.readouterr().err.count("warning: ") == 2 and not checkpoint.steps(run.folder)


def test_a_save_that_hangs_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, monkeypatch, timeout_minutes=0.0)
    run.progress.total_steps = 4

    def after_step(step: int) -> None:
        if step == 4:
            threading.Timer(0.2, run.may_write.set).start()

    run.on_step = after_step
    run.go()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint: step 2: not on the disk after 0 minutes; training goes on until")


def test_copies_are_what_safetensors_would_save_and_do_not_follow_the_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "none": torch.empty(0, 4), "scalar": torch.tensor(-0.0)}
    memory = HostMemory()
    copies = memory.copy("weights", tensors)
    save_file(tensors, tmp_path / "tensors")
    for tensor in tensors.values():
        tensor.add_(1)
    save_file(copies, tmp_path / "copies")
    assert (tmp_path / "tensors").read_bytes() == (tmp_path / "copies").read_bytes()
    again = memory.copy("weights", tensors)
    assert all(again[name].data_ptr() == copies[name].data_ptr() for name in tensors)  # the same memory
    assert all(again[name].equal(tensors[name]) for name in tensors)
