"""Collectives, named by their purpose; for a single process each is the identity.

Shape suffixes: N rows on this rank, M rows on all ranks, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lodestar.errors import ConfigError, LodestarError

Result = TypeVar("Result")
Value = TypeVar("Value")
# torch 2.13 renamed both, and warns of the old names.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank() -> int:
    """0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """(N, ...) on each rank -> (M, ...) on every rank, rank-major, differentiable; N = counts[rank] may differ."""
    if world_size() == 1:
        return x_ND
    return _GatherRows.apply(x_ND, list(counts))  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    """`gather_rows`; its backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        max_count, width = max(counts), x_ND.shape[1:]
        gathered = x_ND.new_empty(len(counts) * max_count, *width)
        _all_gather(gathered, _with_rows(x_ND, max_count))
        if min(counts) == max_count:
            return gathered
        return torch.cat([rows[:count] for rows, count in zip(gathered.split(max_count), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank used every row, so a row's gradient is the sum over ranks.
        (grad_MD,), counts = grads, ctx.counts
        max_count = max(counts)
        if min(counts) < max_count:
            grad_MD = torch.cat([_with_rows(rows, max_count) for rows in grad_MD.split(counts)])
        grad_ND = grad_MD.new_empty(max_count, *grad_MD.shape[1:])
        _reduce_scatter(grad_ND, grad_MD.contiguous())
        return grad_ND[: counts[rank()]], None


def _with_rows(x_ND: Tensor, count: int) -> Tensor:
    """The rows and zeros up to `count`, which collectives need to be equal on all ranks; the same tensor if it is."""
    if len(x_ND) == count:
        return x_ND.contiguous()
    return torch.cat([x_ND, x_ND.new_zeros(count - len(x_ND), *x_ND.shape[1:])])


def gather_on_main(x_N: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """(N,) on each rank -> those of all ranks on rank 0, nothing elsewhere; N = counts[rank] may differ."""
    if world_size() == 1:
        return [x_N]
    padded = _with_rows(x_N, max(counts))
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else []
    dist.gather(padded, parts or None, dst=0)
    return [part[:count] for part, count in zip(parts, counts, strict=False)]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum over ranks, on every rank; not differentiable."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks, on every rank; not differentiable."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def max_over_ranks_later(x: Tensor) -> Callable[[], Tensor]:
    """Starts `max_over_ranks`, and returns a function that waits for the result."""
    if world_size() == 1:
        return lambda: x
    result = x.detach().clone()
    work: Any = dist.all_reduce(result, op=dist.ReduceOp.MAX, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def gather_objects(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Each rank's small Python value, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's small Python value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_broken(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it because a peer does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def barrier() -> None:
    """Wait for all ranks."""
    gather_objects(None)


@contextmanager
def agreed(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A LodestarError that one rank raises inside, every rank raises at the end: no rank waits for one that left."""
    local_error: LodestarError | None = None
    try:
        yield
    except LodestarError as error:
        local_error = error
    for error in gather_objects(local_error, group):
        if error is not None:
            raise error


def require_same(values: Mapping[str, Any], what: str) -> None:
    """ConfigError on every rank, with ranks and keys, unless all ranks have equal values, which must be JSON values.

    what   the subject of the error message
    """
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    of_main, *of_others = gather_objects(dict(values))
    differences: list[str] = []
    for number, other in enumerate(of_others, 1):
        keys = [key for key in of_main | other if of_main.get(key) != other.get(key)]
        if keys:
            pairs = ", ".join(f"{key} {other.get(key)!r}, not {of_main.get(key)!r}" for key in keys)
            differences.append(f"rank {number} has {pairs}")
    raise ConfigError(f"{what}: not the same as on rank 0: {'; '.join(differences)} (start all ranks with the same)")


def on_main(build: Callable[[], Result]) -> Result:
    """`build()` of rank 0, on every rank; its LodestarError is raised on every rank."""
    result = None
    with agreed():
        if rank() == 0:
            result = build()
    return from_main(result)


def once_per_node(build: Callable[[], Result], local_rank: int) -> Result:
    """`build()` on the first rank of each node, then, when its files are on the disk, on the others."""
    # A large data set takes hours: longer than the time-out of other collectives.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=2)) if world_size() > 1 else None
    results: list[Result] = []
    for takes_part in (local_rank == 0, local_rank != 0):
        with agreed(group):
            if takes_part:
                results.append(build())
    if group is not None:
        dist.destroy_process_group(group)
    return results[0]


def gather_counts(count: int) -> list[int]:
    """Each rank's count, on every rank, in rank order."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64)  # on the CPU: gloo, without a synchronisation of the GPU
    counts[rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()
