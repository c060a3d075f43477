"""The sections of benchmarks/gpu.py, which runs them in a child: python -m benchmarks.gpu_sections LINES NAME ...

Each yields (case, values) and prints them as they come. Values under `detail` go to the JSON alone.
Shape suffixes: T tokens, B texts, H heads, L tokens of a text, D width.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_parts import kernels_of_step, parts_of_step, waits_of_step
from benchmarks.gpu_workload import TINY, Bench, Job, Sizes, bench_on, finetune, lengths_of, pretrain
from lodestar import rng
from lodestar.planning.cost_model import DEVICES
from retromae.loss import summed_nll
from retromae.masks import decoder_visibility, mask_tokens

Rows = Iterator[tuple[str, dict[str, Any]]]
STAGES = {"pretrain": pretrain, "finetune": finetune}
PADDED, PACKED = "model.attention=padded", "model.attention=packed"


def main(lines: str, *names: str) -> None:
    tiny = "--tiny" in names
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with bench_on(device, TINY if tiny else Sizes()) as bench, Path(lines).open("a") as file:
        for name in names:
            if name == "--tiny":
                continue
            file.write(json.dumps({"section": name, "began": time.time()}) + "\n")
            file.flush()
            try:
                for case, values in SECTIONS[name](bench):
                    record = json.dumps({"section": name, "case": case, "values": values})
                    print(record[:2000], flush=True)
                    file.write(record + "\n")
                    file.flush()
            except Exception as error:  # the other sections go on
                traceback.print_exc()
                message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                record = json.dumps({"section": name, "case": "failed", "values": {"error": message}})
                print(record, flush=True)
                file.write(record + "\n")
                file.flush()
                if "CUDA error" in str(error):  # this process can use the GPU no more
                    raise SystemExit(3) from None
            gc.collect()
            torch.cuda.empty_cache()


def yardstick(bench: Bench) -> Rows:
    size = 8192 if bench.on_gpu else 256
    yield "machine", machine(bench)
    for name in ("bf16", "fp16", "tf32", "fp32"):
        yield f"product of {size} x {size}, {name}", {"tflops": product_rate(bench, name, size) / 1e12}
    x = torch.empty(2**30 if bench.on_gpu else 2**20, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    seconds = bench.seconds(lambda: y.copy_(x))
    yield "copy on the device, read and written", {"gb_per_second": 2 * len(x) / seconds / 1e9}


def machine(bench: Bench) -> dict[str, Any]:
    import transformers

    gpu = torch.cuda.get_device_name() if bench.on_gpu else "no GPU"
    return {"device": gpu, "torch": torch.__version__, "transformers": transformers.__version__}


def product_rate(bench: Bench, precision: str, size: int) -> float:
    """FLOP/s of square matrix products."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * size**3 / bench.seconds(lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


def measured(job: Job, rate: float) -> dict[str, Any]:
    """Speed, memory, and the share of the device's rate that useful tokens alone reach."""
    values = job.measure()
    flops = values["tflops"] * 1e12
    return {**values, "mfu_of_measured": flops / rate, "mfu_of_peak": flops / DEVICES["h100"].half_flops}


def speed(bench: Bench, *overrides: str, kinds: tuple[str, ...] = ("natural", "full")) -> Rows:
    """Both recipes' step at their size on one device."""
    rate = product_rate(bench, "bf16", 8192 if bench.on_gpu else 256)
    for stage, build in STAGES.items():
        for kind in kinds:
            yield f"{stage}, {kind} lengths", measured(build(bench, kind, *overrides), rate)
            gc.collect()


def padded(bench: Bench) -> Rows:
    yield from speed(bench, PADDED)


def packed(bench: Bench) -> Rows:
    yield from speed(bench, PACKED)


def compiled(bench: Bench) -> Rows:
    for case, values in speed(bench, PACKED, "model.compile=layers"):
        yield f"{case}, packed, layers compiled", values


def gradcache(bench: Bench) -> Rows:
    """Micro-batches of which no graph is kept, all are kept, and the step in one pass."""
    rate = product_rate(bench, "bf16", 8192 if bench.on_gpu else 256)
    tokens = 3 * bench.sizes.queries * bench.sizes.short_length
    for case, overrides in {
        "no graph kept": (f"batch.micro_tokens={tokens // 8}", "batch.keep_graph=0"),
        "all graphs kept": (f"batch.micro_tokens={tokens // 8}", "batch.keep_graph=1000"),
        "one pass": (f"batch.micro_tokens={tokens}",),
    }.items():
        yield f"finetune, natural lengths, {case}", measured(finetune(bench, "natural", *overrides), rate)
        gc.collect()


def whole(bench: Bench) -> Rows:
    """One step of all 32,768 queries and 65,536 passages on this device."""
    job = finetune(bench, "natural", batches=1, queries=bench.sizes.all_queries)
    start = bench.now()
    job.step()
    yield "finetune, natural lengths, all queries, first step", {"seconds": bench.now() - start}
    yield "finetune, natural lengths, all queries", job.measure(1)


def correct(bench: Bench) -> Rows:
    """Gradients and losses in half precision and packed against fp32 and padded; masks; dropout."""
    yield from same_masks(bench)
    for stage, build in STAGES.items():
        expected = None
        for name, overrides in {
            "fp32, padded": ("precision=fp32", PADDED),
            "fp32, packed": ("precision=fp32", PACKED),
            "bf16, padded": ("precision=bf16", PADDED),
            "bf16, packed": ("precision=bf16", PACKED),
            "fp16, packed": ("precision=fp16", PACKED),
        }.items():
            if "fp16" in name and not bench.on_gpu:
                continue
            job = build(bench, "natural", "model.dropout=0", *overrides, batches=1)
            gradient = job.gradient()
            expected = gradient if expected is None else expected
            error = float((gradient - expected).norm() / expected.norm())
            yield f"{stage}, {name}", {"loss": float(job.scalars["loss"]), "gradient_error": error}
            gc.collect()
        for attention in ("padded", "packed"):
            job = build(bench, "natural", f"model.attention={attention}", batches=1)
            first, second = job.gradient(), job.gradient()
            yield f"{stage}, {attention}, dropout, the same step twice", {
                "equal": bool(first.equal(second)), "gradient_error": float((first - second).norm() / first.norm())
            }  # fmt: skip


def same_masks(bench: Bench) -> Rows:
    """Both stages of masking on the CPU and on the device."""
    length, count = bench.sizes.text_length, 8
    words_BL = (torch.arange(length) // 2).repeat(count, 1).short()
    words_BL[:, 0] = -1
    lengths_B, rng_key_B = torch.full((count,), length), torch.arange(count) * 7919
    ids_BL = torch.randint(5, bench.sizes.vocabulary, (count, length))
    ordinary_V = torch.arange(5, bench.sizes.vocabulary)

    def masks(device: torch.device) -> list[Tensor]:
        words, lengths, keys = (x.to(device) for x in (words_BL, lengths_B, rng_key_B))
        masked = mask_tokens(ids_BL.to(device), words, lengths, keys, 0.3, 4, ordinary_V.to(device))
        return [x.cpu() for x in (decoder_visibility(words, lengths, keys, 0.5, 256), *masked)]

    pairs = zip(masks(torch.device("cpu")), masks(bench.device), strict=True)
    yield "masks on both devices", {"equal": all(x.equal(y) for x, y in pairs)}


def inside(bench: Bench) -> Rows:
    """What a step does: where the host waits, the time by part and by kind of kernel, and that of making its batch."""
    for stage, build in STAGES.items():
        for attention in ("packed", "padded"):
            job, name = build(bench, "natural", f"model.attention={attention}"), f"{stage}, {attention}"
            wall_ms = job.measure()["ms"]
            start = time.perf_counter()
            job.collate(0)
            loader_ms = (time.perf_counter() - start) * 1e3
            yield f"{name}, ms by part", {**parts_of_step(job), "loader (one core of the host)": loader_ms}
            yield f"{name}, ms by kernel", kernels_of_step(job, wall_ms)
            if bench.on_gpu:
                yield f"{name}, waits of the host", waits_of_step(job)
            gc.collect()


def head(bench: Bench) -> Rows:
    """The vocabulary head alone, loss and gradient, against whole logits."""
    sizes = bench.sizes
    labels = int(1.3 * sizes.texts * sizes.text_length)
    hidden = torch.randn(labels, sizes.width, device=bench.device, requires_grad=True)
    weight = (torch.randn(sizes.vocabulary, sizes.width, device=bench.device) / 28).requires_grad_()
    bias = torch.zeros(sizes.vocabulary, device=bench.device, requires_grad=True)
    target = torch.randint(sizes.vocabulary, (labels,), device=bench.device)
    flops = 6 * labels * sizes.width * sizes.vocabulary

    def run(function: Any) -> Tensor:
        hidden.grad = weight.grad = bias.grad = None
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = function()
        loss.backward()
        return loss.detach()

    expected = None
    for name, function in {
        "whole logits": lambda: F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="sum"),
        "summed_nll": lambda: summed_nll(hidden, weight, bias, target),
    }.items():
        nats = float(run(function))
        assert weight.grad is not None
        expected = weight.grad.clone() if expected is None else expected
        error = float((weight.grad - expected).norm() / expected.norm())
        seconds = bench.seconds(lambda f=function: run(f), 3)
        values = {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12, "nats": nats, "gradient_error": error}
        yield f"{labels} labels, {name}", values


def attention(bench: Bench) -> Rows:
    """Attention of one layer alone, forward and backward: padded with a mask, and end to end by cumulative lengths."""
    sizes, dtype = bench.sizes, torch.bfloat16
    lengths_N = np.sort(lengths_of("natural", 64, sizes.text_length, median=100, spread=1.0))
    longest, total = int(lengths_N.max()), int(lengths_N.sum())
    shape = sizes.heads, sizes.width // sizes.heads
    mask_B11L = (torch.arange(longest) < torch.from_numpy(lengths_N)[:, None])[:, None, None].to(bench.device)
    x = torch.randn(len(lengths_N), shape[0], longest, shape[1], device=bench.device, dtype=dtype, requires_grad=True)

    def with_mask() -> None:
        F.scaled_dot_product_attention(x, x, x, mask_B11L, 0.1).sum().backward()

    yield "64 texts, padded", {"ms": bench.seconds(with_mask) * 1e3}
    if not bench.on_gpu:
        return
    offsets = torch.from_numpy(np.concatenate([[0], lengths_N.cumsum()])).int().to(bench.device)
    x_THD = torch.randn(total, *shape, device=bench.device, dtype=dtype, requires_grad=True)

    def by_offsets() -> None:
        out = torch.ops.aten._flash_attention_forward(
            x_THD, x_THD, x_THD, offsets, offsets, longest, longest, 0.1, False, False
        )
        out[0].sum().backward()

    yield "64 texts, end to end", {"ms": bench.seconds(by_offsets) * 1e3}


SECTIONS = {
    "yardstick": yardstick, "packed": packed, "padded": padded, "inside": inside, "correct": correct,
    "gradcache": gradcache, "head": head, "attention": attention, "whole": whole, "compile": compiled,
}  # fmt: skip

if __name__ == "__main__":
    rng.seed_everything(0)
    main(*sys.argv[1:])
