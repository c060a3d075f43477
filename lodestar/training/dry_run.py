"""A few real steps on generated text of the true shapes, longest first: what one runs before a long job."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lodestar.config.schema import AUTO
from lodestar.distributed.collectives import gather_objects
from lodestar.distributed.runtime import Placement, Runtime
from lodestar.distributed.session import distributed_session
from lodestar.planning.plan import in_words
from lodestar.reporting.throughput import peak_memory_bytes
from lodestar.training import checkpoint
from lodestar.training.auto_batch_size import with_largest_micro_size
from lodestar.training.build_engine import build
from lodestar.training.engine import Engine
from lodestar.training.loop import Progress, StepDone, fit
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import Recipe, TaskSpec


def rehearse(recipe: Recipe, placement: Placement, spec: TaskSpec[Recipe], steps: int) -> int:
    """Take `steps` steps on all ranks, print what they cost, and leave nothing behind."""
    with distributed_session(placement, recipe.engine.timeout_minutes, recipe) as runtime:
        if recipe.batch.micro_size == AUTO:
            recipe = with_largest_micro_size(recipe, runtime, spec)
        micro_size = recipe.batch.plan(1).micro_size
        with synthetic_task(recipe, runtime, spec, micro_size=micro_size, steps=steps) as (_, task):
            engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
            waiting = _Waiting()
            watch = _Watch(runtime, waiting)
            with closing(task.batches(0)) as batches:  # closing ends the workers
                fit(
                    task.stage,
                    engine,
                    waiting.over(batches),
                    progress=Progress(steps),
                    lr_factor_at=lambda step: 0.0,
                    hooks=[watch],
                )
            saved = _save(engine, runtime)
        found = gather_objects({**watch.found(), **saved})
        if runtime.is_main:
            planned = spec.plan(recipe, runtime.world_size, None)
            print(in_words(_report(found, planned, steps, runtime.device.type == "cuda")))
    return 0


class _Waiting:
    """Seconds that the loop waited for its next batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def over(self, batches: Generator[Any]) -> Generator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.seconds.append(time.perf_counter() - start)
            yield batch


class _Watch:
    """A hook that takes the time of each step, and looks into the last one."""

    def __init__(self, runtime: Runtime, waiting: _Waiting) -> None:
        on_gpu = runtime.device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._on_gpu, self._waiting = on_gpu, waiting
        self._seconds: list[float] = []
        self._tokens = 0

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(self, progress: Progress) -> None:
        self._start = self._now()

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        now = self._now()
        self._seconds.append(now - self._start)
        self._tokens = done.batch.padded_tokens
        if progress.step == progress.total_steps - 1:
            self._profile.start()
        self._start = self._now()

    def after(self, progress: Progress) -> None:
        self._profile.stop()

    def found(self) -> dict[str, Any]:
        # gloo and NCCL name their operations themselves; the last step is timed apart, for looking costs time
        last = {e.key: e for e in self._profile.key_averages() if e.key.startswith(("gloo:", "nccl:"))}
        return {
            "first": self._seconds[0],
            "step": statistics.median(self._seconds[1:-1]),
            "loader": statistics.median(self._waiting.seconds[1:]),
            "collectives": sum(max(e.cpu_time_total, e.device_time_total) for e in last.values()) / 1e6,
            "calls": sum(e.count for e in last.values()),
            "peak": peak_memory_bytes(),
            "tokens": self._tokens,
        }


def _save(engine: Engine, runtime: Runtime) -> dict[str, float]:
    """Write a checkpoint, and take its time and size."""
    start = time.perf_counter()
    tensors = {"weights": engine.weights(), "optimizer": engine.optimizer_state()}
    written = 0
    if runtime.is_main:
        with tempfile.TemporaryDirectory() as name:
            folder = checkpoint.write(Path(name), 1, tensors=tensors, values={})
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"saving": time.perf_counter() - start, "saved": written}


def _report(found: list[Mapping[str, Any]], planned: Mapping[str, Any], steps: int, on_gpu: bool) -> dict[str, Any]:
    def most(name: str) -> Any:
        return max(rank[name] for rank in found)

    step, wanted = most("step"), planned["peak_memory_bytes"] / 2**30
    return {
        "rehearsed": f"{steps} steps of {planned['global_size']:,} examples on {len(found)} ranks",
        "first_step": f"{most('first'):.3f} s, all texts at their longest",
        "step": f"{step:.3f} s, {sum(rank['tokens'] for rank in found) / step:,.0f} tokens/s, padding counted",
        "waiting_for_the_loader": f"{most('loader'):.3f} s of it",
        "collectives": f"{most('collectives'):.3f} s, {most('calls')} calls in the last step",
        "peak_memory": f"{most('peak') / 2**30:.2f} GiB{'' if on_gpu else ' of a whole process'}, planned {wanted:.2f}",
        "checkpoint": f"{most('saved') / 2**30:.2f} GiB in {most('saving'):.1f} s",
        "the_run": "not known without data"
        if planned["steps"] is None
        else f"{planned['steps']:,} steps, {planned['steps'] * step / 3600:,.1f} hours at this speed",
    }
