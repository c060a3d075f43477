"""One step of pre-training: losses of encoder and decoder, summed over independent micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lodestar import rng
from lodestar.distributed.collectives import sum_over_ranks
from lodestar.training.engine import Engine
from retromae.collate import StepBatch


class PretrainStage:
    """loss = sum over terms of weight * nats / the term's labels in the global batch."""

    def __init__(self, *, weights: Mapping[str, float], seed: int, device: torch.device) -> None:
        """weights   of the sums that RetroMAE.forward returns, in its order; names as in StepBatch.label_counts"""
        self._weights, self._seed, self._device = weights, seed, device

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Mapping[str, Tensor]:
        batch = batch.to(self._device)
        assert [*batch.label_counts] == [*self._weights]  # in one order
        counts = sum_over_ranks(batch.tensors["label_counts"]).float().clamp(min=1)
        local_losses = torch.zeros(len(counts), device=self._device)
        count = batch.num_micro_batches
        for i in range(count):
            rng.seed_everything(self._seed, "dropout", step, batch.numbers[i])
            losses = torch.stack(engine.run(*batch.inputs(i), last=i == count - 1)) / counts
            engine.backward(self._weighted(losses), last=i == count - 1)
            local_losses += losses.detach()
        terms = zip(self._weights.items(), local_losses, strict=True)
        scalars = {f"{name}_loss": loss for (name, weight), loss in terms if weight}
        return {"loss": self._weighted(local_losses), **scalars}

    def _weighted(self, losses: Tensor) -> Tensor:
        total = losses.new_zeros(())
        for weight, loss in zip(self._weights.values(), losses, strict=True):
            total = total + weight * loss
        return total
