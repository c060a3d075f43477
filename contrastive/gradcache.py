"""GradCache: the gradient of a loss over all embeddings of a step, at the memory of one micro-batch.

Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, L tokens, B texts of a micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lodestar.distributed.collectives import gather_counts
from lodestar.training.engine import Engine

Scalars = Mapping[str, Tensor]


Temperature = Tensor | float


class KeepGraph:
    """How many micro-batches of a step keep their graph from the first pass."""

    def __init__(self, keep: float, memory_bytes: int, max_length: int) -> None:
        self._keep, self._memory_bytes, self._max_length = keep, memory_bytes, max_length
        self._bytes: tuple[float, float] | None = None
        """Of a graph, and of each token in it."""

    def first(self, tokens: list[int], embed: Callable[[Tensor], object]) -> int:
        """So many of the first micro-batches (of so many tokens each, padding counted), the same on every rank.

        What a graph takes is measured once, on texts that are the same whenever a run goes on.
        """
        if self._keep == 0 or self._keep >= 1:
            return min(int(self._keep), len(tokens))
        if self._bytes is None:
            two_BL = torch.ones(2, self._max_length, dtype=torch.int64)
            one = max(gather_counts(graph_bytes(lambda: embed(two_BL[:1]))))
            two = max(gather_counts(graph_bytes(lambda: embed(two_BL))))
            self._bytes = 2 * one - two, (two - one) / self._max_length
        left, kept = self._keep * self._memory_bytes, 0
        while kept < len(tokens) and (left := left - self._bytes[0] - tokens[kept] * self._bytes[1]) >= 0:
            kept += 1
        return min(gather_counts(kept))


def graph_bytes(run: Callable[[], object]) -> int:
    """Memory that the graph of `run()` holds on to besides parameters."""
    held: dict[int, int] = {}

    def remember(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter) and not isinstance(x._base, torch.nn.Parameter):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        result = run()
    del result
    return sum(held.values())


def gradcache_backward(
    run: Callable[[int], tuple[Tensor, Temperature]],
    count: int,
    kept: int,
    local_losses_of: Callable[[Tensor, Temperature], Scalars],
    engine: Engine,
) -> Scalars:
    """The gradient of a loss over all embeddings, holding the activations of `kept` micro-batches, or of one."""
    first = []
    for i in range(count):  # 1. embed all
        with torch.set_grad_enabled(i < kept):
            first.append(run(i))
    temperature = first[-1][1]
    leaf_ND = torch.cat([unit_BD.detach() for unit_BD, _ in first]).requires_grad_()  # 2. the loss sees all of them
    leaves = [leaf_ND]
    if isinstance(temperature, Tensor):
        leaves.append(temperature := temperature.detach().requires_grad_())
    scalars = local_losses_of(leaf_ND, temperature)
    grad_ND, *grad_temperature = torch.autograd.grad(scalars["loss"], leaves)
    grads = grad_ND.split([len(unit_BD) for unit_BD, _ in first])
    # 3. push it through: all kept graphs at once, because ZeRO-3 loses gradients otherwise, then one by one
    for i in range(max(0, kept - 1), count):
        parts, grads_i = (first[:kept], grads[:kept]) if i < kept else ([run(i)], grads[i : i + 1])
        surrogate = (torch.cat([unit_BD for unit_BD, _ in parts]) * torch.cat(grads_i)).sum()
        last = i == count - 1
        engine.backward(
            surrogate + sum(parts[-1][1] * grad for grad in grad_temperature) if last else surrogate, last=last
        )
    return scalars
