"""GradCache: the gradient of a loss over all embeddings of a step, at the memory of one micro-batch.

Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, L tokens, B texts of a micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    embed: Callable[[int], tuple[Tensor, Temperature]],
    num_micro_batches: int,
    num_kept: int,
    losses_of: Callable[[Tensor, Temperature], Scalars],
    engine: Engine,
) -> Scalars:
    """The gradient of a loss over all embeddings, holding the activations of `num_kept` micro-batches, or of one.

    embed      number of a micro-batch -> its (B, D) embeddings, the same whenever it is called, and the temperature
    losses_of  (N, D) embeddings of all micro-batches, temperature -> scalars, of which `loss` is minimised
    """
    embeddings, temperature = _embed_all(embed, num_micro_batches, num_kept)
    scalars, grads, grad_temperature = _gradient_of_embeddings(embeddings, temperature, losses_of)
    _backpropagate(embed, embeddings, temperature, grads, grad_temperature, num_kept, engine)
    return scalars


def _embed_all(
    embed: Callable[[int], tuple[Tensor, Temperature]], num_micro_batches: int, num_kept: int
) -> tuple[list[Tensor], Temperature]:
    """Step 1: all embeddings; only those of the first `num_kept` micro-batches have a graph."""
    embeddings: list[Tensor] = []
    temperature: Temperature = 1.0
    for i in range(num_micro_batches):
        with torch.set_grad_enabled(i < num_kept):
            unit_BD, temperature = embed(i)
        embeddings.append(unit_BD)
    return embeddings, temperature


def _gradient_of_embeddings(
    embeddings: list[Tensor], temperature: Temperature, losses_of: Callable[[Tensor, Temperature], Scalars]
) -> tuple[Scalars, Sequence[Tensor], Tensor | None]:
    """Step 2: the loss sees all embeddings at once; its gradient by micro-batch, and of a learned temperature."""
    leaf_ND = torch.cat([unit_BD.detach() for unit_BD in embeddings]).requires_grad_()
    leaves = [leaf_ND]
    if isinstance(temperature, Tensor):
        leaves.append(temperature := temperature.detach().requires_grad_())
    scalars = losses_of(leaf_ND, temperature)
    grad_ND, *grad_temperature = torch.autograd.grad(scalars["loss"], leaves)
    grads = torch.split(grad_ND, [len(unit_BD) for unit_BD in embeddings])
    return scalars, grads, grad_temperature[0] if grad_temperature else None


def _backpropagate(
    embed: Callable[[int], tuple[Tensor, Temperature]],
    embeddings: list[Tensor],
    temperature: Temperature,
    grads: Sequence[Tensor],
    grad_temperature: Tensor | None,
    num_kept: int,
    engine: Engine,
) -> None:
    """Step 3: push the gradient of the embeddings through the encoder; the last backward reduces over ranks.

    Kept graphs go in one backward, because ZeRO-3 loses gradients otherwise; the others are computed again, one by one.
    """

    def push(parts: Sequence[Tensor], grads_of_parts: Sequence[Tensor], temperature: Temperature, last: bool) -> None:
        surrogate = (torch.cat(list(parts)) * torch.cat(list(grads_of_parts))).sum()
        if last and grad_temperature is not None:
            surrogate = surrogate + temperature * grad_temperature
        engine.backward(surrogate, last=last)

    count = len(embeddings)
    if num_kept:
        push(embeddings[:num_kept], grads[:num_kept], temperature, last=num_kept == count)
    for i in range(num_kept, count):
        unit_BD, temperature = embed(i)
        push([unit_BD], [grads[i]], temperature, last=i == count - 1)
