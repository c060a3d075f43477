"""The dry run of `--rehearse`: real steps on generated text of the recipe's shapes, longest first."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
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
from lodestar.training.auto_batch_size import with_measured_micro_tokens
from lodestar.training.build_engine import build
from lodestar.training.engine import Engine
from lodestar.training.host_memory import HostMemory
from lodestar.training.loop import Progress, StepDone, fit
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import Recipe, TaskSpec


def rehearse(recipe: Recipe, placement: Placement, spec: TaskSpec[Recipe], steps: int) -> int:
    """Take `steps` steps on all ranks and print what they cost; nothing is left on the disk. Returns the exit code."""
    with distributed_session(placement, recipe.engine.timeout_minutes, recipe) as runtime:
        if recipe.batch.micro_tokens == AUTO:
            recipe = with_measured_micro_tokens(recipe, runtime, spec)
        with synthetic_task(recipe, runtime, spec, steps=steps) as (_, task):
            engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
            loader_timer = _LoaderTimer()
            step_timer = _StepTimer(runtime, loader_timer)
            with closing(task.batches(0)) as batches:  # closing ends the workers
                fit(
                    task.stage,
                    engine,
                    loader_timer.over(batches),
                    progress=Progress(steps),
                    lr_factor_at=lambda step: 0.0,
                    hooks=[step_timer],
                )
            saving = _save(engine, runtime)
        by_rank = gather_objects({**step_timer.measurements(), **saving})
        if runtime.is_main:
            plan = spec.plan(recipe, runtime.world_size, None)
            print(in_words(_report(by_rank, plan, steps, runtime.device.type == "cuda")))
    return 0


class _LoaderTimer:
    """Seconds that the loop waited for its next batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def over(self, batches: Generator[Any]) -> Generator[Any]:
        """The batches, timed."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.seconds.append(time.perf_counter() - start)
            yield batch


class _StepTimer:
    """A hook that measures the time of each step, and profiles the last one."""

    def __init__(self, runtime: Runtime, loader_timer: _LoaderTimer) -> None:
        on_gpu = runtime.device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._on_gpu, self._loader_timer = on_gpu, loader_timer
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

    def measurements(self) -> dict[str, Any]:
        """Times in seconds, memory in bytes; the median leaves out the profiled last step."""
        # gloo and NCCL name their own operations
        collectives = [e for e in self._profile.key_averages() if e.key.startswith(("gloo:", "nccl:"))]
        return {
            "first": self._seconds[0],
            "step": statistics.median(self._seconds[1:-1]),
            "loader": statistics.median(self._loader_timer.seconds[1:]),
            "collectives": sum(max(e.cpu_time_total, e.device_time_total) for e in collectives) / 1e6,
            "calls": sum(e.count for e in collectives),
            "peak": peak_memory_bytes(),
            "tokens": self._tokens,
        }


def _save(engine: Engine, runtime: Runtime) -> dict[str, float]:
    """Write a checkpoint; its bytes, and the seconds until its tensors are copied and until it is on the disk."""
    start, memory, saved_bytes = time.perf_counter(), HostMemory(), 0
    tensors = {"weights": engine.weights(memory), "optimizer": engine.optimizer_state(memory)}
    copied = time.perf_counter()
    if runtime.is_main:
        with tempfile.TemporaryDirectory() as name:
            folder = checkpoint.write(Path(name), 1, tensors=tensors, values={})
            saved_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"copying": copied - start, "saving": time.perf_counter() - start, "saved": saved_bytes}


def _report(by_rank: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], steps: int, on_gpu: bool) -> dict[str, Any]:
    def largest(name: str) -> Any:
        return max(measurements[name] for measurements in by_rank)

    step, planned_gib = largest("step"), plan["peak_memory_bytes"] / 2**30
    return {
        "dry_run": f"{steps} steps of {plan['global_size']:,} examples on {len(by_rank)} ranks",
        "first_step": f"{largest('first'):.3f} s, all texts of maximum length",
        "step": f"{step:.3f} s, {sum(rank['tokens'] for rank in by_rank) / step:,.0f} tokens/s, padding included",
        "waiting_for_the_loader": f"{largest('loader'):.3f} s of the step",
        "collectives": f"{largest('collectives'):.3f} s, {largest('calls')} calls in the last step",
        "peak_memory": f"{largest('peak') / 2**30:.2f} GiB{'' if on_gpu else ' of a whole process'}, "
        f"planned {planned_gib:.2f}",
        "checkpoint": f"{largest('saved') / 2**30:.2f} GiB in {largest('saving'):.1f} s, of which a step waits for "
        f"{largest('copying'):.2f} s",
        "whole_run": "not known without data"
        if plan["steps"] is None
        else f"{plan['steps']:,} steps, {plan['steps'] * step / 3600:,.1f} hours at this speed",
    }
