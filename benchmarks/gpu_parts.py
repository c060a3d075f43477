"""Where the time of a training step goes: by part of the step, by kind of kernel, and where the host waits."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_workload import Job


class Spans:
    """Times between marks on the device's stream, by name; on a CPU by its clock."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any) -> None:
        """A span from a mark until now."""
        self._pairs[name].append((start, self.mark()))

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = self.mark()
            result = function(*args, **options)
            self.add(name, start)
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        return {name: sum(map(self._between, pairs)) for name, pairs in self._pairs.items()}

    def _between(self, pair: tuple[Any, Any]) -> float:
        start, end = pair
        return start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3


def parts_of_step(job: Job) -> dict[str, float]:
    """Milliseconds of one step. The head computes its gradient in the forward; so does the loss of fine-tuning."""
    spans = Spans(job.bench.on_gpu)
    with _watched(job, spans):
        start = spans.mark()
        job.step()
        spans.add("step", start)
    ms = spans.milliseconds()
    encoder_backward = ms.get("encoder backward", 0.0)
    if "backward" in ms:
        ms["backward of the rest"] = ms.pop("backward") - encoder_backward
    ms["other"] = ms["step"] - sum(value for name, value in ms.items() if name != "step")
    return ms


@contextmanager
def _watched(job: Job, spans: Spans) -> Iterator[None]:
    """The parts of the step replaced by timed ones."""
    base = job.module.encoder.base_model
    reached: list[Any] = []

    def encoder(*args: Any, forward: Callable[..., Any] = base.forward, **options: Any) -> Any:
        start = spans.mark()
        output = forward(*args, **options)
        spans.add("encoder", start)
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda grad: reached.append(spans.mark()))
        return output

    def backward(*args: Any, run: Callable[..., Any] = job.engine.backward, **options: Any) -> None:
        reached.clear()
        start = spans.mark()
        run(*args, **options)
        spans.add("backward", start)
        if reached:  # the gradient has come to the first encoder output that it reaches
            spans.add("encoder backward", reached[0])

    with ExitStack() as stack:
        stack.enter_context(patch.object(base, "forward", encoder))
        stack.enter_context(patch.object(job.engine, "backward", backward))
        stack.enter_context(patch.object(job.engine, "step", spans.timed(job.engine.step, "optimizer")))
        for name, part in PARTS.items():
            stack.enter_context(patch(name, spans.timed(_resolve(name), part)))
        if hasattr(job.module, "decoder"):
            decoder = job.module.decoder
            stack.enter_context(patch.object(decoder, "forward", spans.timed(decoder.forward, "decoder")))
        yield


PARTS = {
    "retromae.model.summed_nll": "vocabulary head",
    "retromae.model.decoder_visibility": "decoder masks",
    "contrastive.stage.contrastive_local_loss": "loss",
}
"""Functions of the product, by what they are."""


def _resolve(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    return getattr(__import__(module, fromlist=[attribute]), attribute)


KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "mm"),
    "optimizer": ("multi_tensor", "fused_adam"),
    "norms": ("layer_norm", "layernorm", "gammabeta"),
    "copies and casts": ("copy", "memcpy", "memset", "catarray"),
    "softmax and sums": ("softmax", "reduce", "nll"),
    "dropout": ("dropout",),
    "gather and scatter": ("index", "gather", "scatter", "embedding", "sort", "scan"),
    "elementwise": ("elementwise",),
    "triton": ("triton",),
}
"""Parts of kernels' names; the first that fits counts."""


def kernels_of_step(job: Job, wall_ms: float) -> dict[str, Any]:
    """Milliseconds by kind, the number of kernels, idle time, and the longest kernels in detail."""
    on_gpu = job.bench.on_gpu
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        job.step()
        job.bench.now()
    ms: Counter[str] = Counter()
    kernels: list[tuple[str, float, int]] = []
    for event in recorded.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu:
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key.lower() for n in names)), "other")
        ms[kind] += spent
        kernels.append((event.key[:120], spent, event.count))
    kernels.sort(key=lambda kernel: -kernel[1])
    return {
        "wall": wall_ms,
        "idle": wall_ms - sum(ms.values()),
        "kernels": sum(count for *_, count in kernels),
        **dict(ms.most_common()),
        "detail": kernels[:40],
    }


def waits_of_step(job: Job) -> dict[str, Any]:
    """How often the host waits for the device, and the lines that make it wait."""
    found: Counter[str] = Counter()

    def record(message: Any, *args: Any, **options: Any) -> None:
        if "prototype" in str(message):  # of the debug mode itself
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "gpu_parts" not in f.filename]
        found[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum(found.values()), "where": dict(found.most_common(8))}
