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
"""Numbers to log, by name; `loss` is minimised."""
Temperature = Tensor | float
"""A tensor where it is learned."""


class KeepGraph:
    """How many micro-batches of a step keep their graphs, so that GradCache need not embed them twice."""

    def __init__(self, keep: float, memory_bytes: int, max_length: int) -> None:
        self._keep, self._memory_bytes, self._max_length = keep, memory_bytes, max_length
        self._graph_bytes: tuple[float, float] | None = None
        """Bytes of a graph whatever its tokens, and bytes per token."""

    def num_graphs(self, tokens_of_rank: Sequence[Sequence[int]], embed: Callable[[Tensor], object]) -> int:
        """The number of leading micro-batches that keep their graphs, the same on every rank.

        tokens_of_rank   of each rank's micro-batches, padding included
        embed            (B, L) ids -> embeddings; called once to measure a graph
        """
        count = len(tokens_of_rank[0])
        if self._keep == 0 or self._keep >= 1:
            return min(int(self._keep), count)
        if self._graph_bytes is None:
            ids_BL = torch.ones(2, self._max_length, dtype=torch.int64)
            bytes_of_one = max(gather_counts(graph_bytes(lambda: embed(ids_BL[:1]))))
            bytes_of_two = max(gather_counts(graph_bytes(lambda: embed(ids_BL))))
            self._graph_bytes = 2 * bytes_of_one - bytes_of_two, (bytes_of_two - bytes_of_one) / self._max_length
        constant, per_token = self._graph_bytes
        most_tokens = [max(tokens) for tokens in zip(*tokens_of_rank, strict=True)]
        free_bytes, kept = self._keep * self._memory_bytes, 0
        while kept < count and (free_bytes := free_bytes - constant - most_tokens[kept] * per_token) >= 0:
            kept += 1
        return kept


def graph_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward of `forward()`, each storage once, without parameters."""
    bytes_by_storage: dict[int, int] = {}

    def record(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter) and not isinstance(x._base, torch.nn.Parameter):
            bytes_by_storage[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        outputs = forward()
    del outputs
    return sum(bytes_by_storage.values())


def gradcache_backward(
    embed: Callable[[int], tuple[Tensor, Temperature]],
    num_micro_batches: int,
    num_graphs: int,
    losses_of: Callable[[Tensor, Temperature], Scalars],
    engine: Engine,
) -> Scalars:
    """Backpropagate a loss over all embeddings of a step, with the activations of `num_graphs` micro-batches or one.

    embed      index of a micro-batch -> its (B, D) embeddings, equal at each call, and the temperature
    losses_of  (N, D) embeddings of all micro-batches, temperature -> scalars, of which `loss` is minimised
    """
    embeddings, temperature = _embed_all(embed, num_micro_batches, num_graphs)
    scalars, grads, grad_temperature = _gradient_of_embeddings(embeddings, temperature, losses_of)
    _backpropagate(embed, embeddings, temperature, grads, grad_temperature, num_graphs, engine)
    return scalars


def _embed_all(
    embed: Callable[[int], tuple[Tensor, Temperature]], num_micro_batches: int, num_graphs: int
) -> tuple[list[Tensor], Temperature]:
    """Step 1: all embeddings; only those of the first `num_graphs` micro-batches have a graph."""
    embeddings: list[Tensor] = []
    temperature: Temperature = 1.0
    for i in range(num_micro_batches):
        with torch.set_grad_enabled(i < num_graphs):
            unit_BD, temperature = embed(i)
        embeddings.append(unit_BD)
    return embeddings, temperature


def _gradient_of_embeddings(
    embeddings: list[Tensor], temperature: Temperature, losses_of: Callable[[Tensor, Temperature], Scalars]
) -> tuple[Scalars, Sequence[Tensor], Tensor | None]:
    """Step 2: the loss sees all embeddings at once; its gradient per micro-batch, and for a learned temperature."""
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
    num_graphs: int,
    engine: Engine,
) -> None:
    """Step 3: backpropagate the gradient of the embeddings through the encoder; the last backward reduces over ranks.

    Graphs that were kept share one backward, because ZeRO-3 loses gradients otherwise; the other micro-batches are
    embedded again, one at a time.
    """

    def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor], temperature: Temperature, last: bool) -> None:
        surrogate = (torch.cat(list(outputs)) * torch.cat(list(grads))).sum()
        if last and grad_temperature is not None:
            surrogate = surrogate + temperature * grad_temperature
        engine.backward(surrogate, last=last)

    count = len(embeddings)
    if num_graphs:
        backward(embeddings[:num_graphs], grads[:num_graphs], temperature, last=num_graphs == count)
    for i in range(num_graphs, count):
        unit_BD, temperature = embed(i)
        backward([unit_BD], [grads[i]], temperature, last=i == count - 1)
