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
    """loss = encoder's nats / all its labels + decoder's nats / all its labels + weight * bag of words / all texts."""

    def __init__(self, *, bag_of_words: float, seed: int, rank: int, device: torch.device) -> None:
        self._bag_of_words, self._seed, self._rank, self._device = bag_of_words, seed, rank, device

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Mapping[str, Tensor]:
        counts = torch.tensor([batch.encoder_labels, batch.decoder_labels, batch.examples], dtype=torch.float64)
        counts = sum_over_ranks(counts).float().clamp(min=1).to(self._device)
        local_losses = torch.zeros(3, device=self._device)
        for i, micro_batch in enumerate(batch.micro_batches):
            last = i == len(batch.micro_batches) - 1
            rng.seed_everything(self._seed, "dropout", step, self._rank, i)
            nats = engine.run(*micro_batch.tensors(self._device), last=last)
            losses = torch.stack(nats) / counts
            engine.backward(losses[0] + losses[1] + self._bag_of_words * losses[2], last=last)
            local_losses += losses.detach()
        loss = local_losses[0] + local_losses[1] + self._bag_of_words * local_losses[2]
        scalars = {"loss": loss, "encoder_loss": local_losses[0], "decoder_loss": local_losses[1]}
        return {**scalars, "bag_of_words_loss": local_losses[2]} if self._bag_of_words else scalars
