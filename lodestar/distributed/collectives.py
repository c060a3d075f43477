"""The few things ranks say to each other, named by meaning; each is the identity when a process is alone.

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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """(N, ...) on each rank -> (M, ...) on every rank, rank-major, differentiable; N = counts[rank] may differ."""
    if world_size() == 1:
        return x_ND
    return _GatherRows.apply(x_ND, list(counts))  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        widest = max(counts)
        padded = x_ND.new_zeros(widest, *x_ND.shape[1:])  # collectives want equal sizes: pad here, trim below
        padded[: len(x_ND)] = x_ND
        gathered = x_ND.new_empty(len(counts) * widest, *x_ND.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        if min(counts) == widest:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(widest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank used every row, so a row's gradient is the sum over ranks.
        (grad_MD,), counts = grads, ctx.counts
        widest = max(counts)
        padded = grad_MD.new_zeros(len(counts) * widest, *grad_MD.shape[1:])
        for part, mine in zip(padded.split(widest), grad_MD.split(counts), strict=True):
            part[: len(mine)] = mine
        own = grad_MD.new_empty(widest, *grad_MD.shape[1:])
        dist.reduce_scatter_tensor(own, padded)
        return own[: counts[rank()]], None


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum over ranks, on every rank; not differentiable."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
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
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_broken(error: RuntimeError) -> bool:
    """Whether this is how gloo or NCCL say that a peer does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def barrier() -> None:
    """Wait until every rank is here."""
    gather_objects(None)


@contextmanager
def agreed(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What one rank raises inside, every rank raises at the end: nobody is left waiting for a rank that has gone."""
    mistake: LodestarError | None = None
    try:
        yield
    except LodestarError as error:
        mistake = error
    for other in gather_objects(mistake, group):
        if other is not None:
            raise other


def require_same(values: Mapping[str, Any], what: str) -> None:
    """ConfigError on every rank, naming ranks and keys, unless all ranks bring equal values, which can become JSON."""
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    first, *others = gather_objects(dict(values))
    lines = []
    for number, other in enumerate(others, 1):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            differing = ", ".join(f"{key} {other.get(key)!r}, not {first.get(key)!r}" for key in keys)
            lines.append(f"rank {number} has {differing}")
    raise ConfigError(f"{what}: not the same as on rank 0: {'; '.join(lines)} (start all ranks with the same)")


def on_main(build: Callable[[], Result]) -> Result:
    """`build()` of rank 0 on every rank; what it raises there, every rank raises."""
    found = None
    with agreed():
        if rank() == 0:
            found = build()
    return from_main(found)


def once_per_node(build: Callable[[], Result], local_rank: int) -> Result:
    """`build()` on the first rank of each node, then, with its files on the disk, on the others."""
    # A large corpus takes hours: longer than any limit on a hanging peer.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=2)) if world_size() > 1 else None
    results: list[Result] = []
    for my_turn in (local_rank == 0, local_rank != 0):
        with agreed(group):
            if my_turn:
                results.append(build())
    if group is not None:
        dist.destroy_process_group(group)
    return results[0]


def gather_counts(count: int) -> list[int]:
    """Each rank's number, on every rank, in rank order."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64)  # on the CPU: gloo, without a word to the GPU
    counts[rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()
