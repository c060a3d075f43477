"""What one step of fine-tuning is: every query of the global batch against every passage of it, in two passes.

The cached step: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, Q queries, P passages of this rank, M passages of all ranks, G passages of one query, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from chassis import chance
from chassis.collectives import gather_counts, gather_rows, rank
from chassis.engine import Engine
from contrastive.collate import StepBatch
from contrastive.config import Loss
from contrastive.loss import Identity, contrastive_share, distillation_share, matryoshka


class FinetuneStage:
    """loss = mean over the global batch of -log p(positive | query), plus what the recipe adds."""

    def __init__(self, *, loss: Loss, global_size: int, seed: int, device: torch.device) -> None:
        self._loss, self._global_size, self._seed, self._device = loss, global_size, seed, device

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Mapping[str, Tensor]:
        def run(i: int) -> Tensor:
            """Embed micro-batch i; the same step always draws the same dropout, so a second pass repeats the first."""
            chance.seed_everything(self._seed, "dropout", step, rank(), i)
            micro_batch = batch.micro_batches[i]
            unit_BD = engine.run(*micro_batch.tensors(self._device), last=i == count - 1)
            return unit_BD if micro_batch.real else unit_BD[:0]

        count = len(batch.micro_batches)
        if batch.single_pass:
            return backward_in_one_pass(run, count, lambda x_ND: self._shares(batch, x_ND), engine)
        return backward_in_two_passes(run, count, lambda x_ND: self._shares(batch, x_ND), engine)

    def _shares(self, batch: StepBatch, sorted_ND: Tensor) -> dict[str, Tensor]:
        """This rank's shares of the loss and of the numbers to log, from its embeddings in the micro-batches' order."""
        device = self._device
        x_ND = torch.empty_like(sorted_ND).index_copy(0, batch.place_N.to(device), sorted_ND)
        q_QD, p_PD = x_ND[: batch.rows], x_ND[batch.rows :]
        counts = gather_counts(len(p_PD)) if self._loss.share_negatives else [len(p_PD)]
        before = sum(counts[: rank()]) if self._loss.share_negatives else 0
        start_Q = batch.start_Q.to(device) + before
        gather: Callable[[Tensor], Tensor] = (
            (lambda rows: gather_rows(rows, counts)) if self._loss.share_negatives else (lambda rows: rows)
        )
        identity = Identity(
            query_B=batch.query_hash_Q.to(device),
            passage_M=gather(batch.passage_hash_P.to(device)),
            owner_M=gather(batch.owner_P.to(device)),
            alone_B=torch.full_like(start_Q, batch.alone, dtype=torch.bool),
            start_B=start_Q,
            end_B=start_Q + batch.count_Q.to(device),
        )
        d_MD = gather(p_PD)
        widths = [x_ND.shape[1], *self._loss.matryoshka]
        weight = 1.0 / (self._global_size * len(widths))
        shares: dict[str, Tensor] = {}
        for width in widths:
            found = contrastive_share(
                matryoshka(q_QD, width), matryoshka(d_MD, width), start_Q, identity,
                temperature=self._loss.temperature, weight=weight,
            )  # fmt: skip
            shares["loss"] = shares["loss"] + found.value if shares else found.value
            if width == x_ND.shape[1]:
                shares |= {
                    "negatives_per_query": found.negatives / self._global_size,
                    "hidden_pairs": found.hidden.float(),
                    "accuracy": found.correct / self._global_size,
                }
        if self._loss.distillation:
            shares["distillation_loss"] = self._distillation(batch, q_QD, p_PD)
            shares["loss"] = shares["loss"] + self._loss.distillation * shares["distillation_loss"]
        return shares

    def _distillation(self, batch: StepBatch, q_QD: Tensor, p_PD: Tensor) -> Tensor:
        teacher_QG = batch.teacher_QG.to(self._device)
        place_G = torch.arange(teacher_QG.shape[1], device=self._device)
        own_QG = batch.start_Q.to(self._device)[:, None] + place_G
        valid_QG = place_G < batch.count_Q.to(self._device)[:, None]
        group_QGD = (
            p_PD[own_QG.clamp(max=max(0, len(p_PD) - 1))]
            if len(p_PD)
            else p_PD.new_zeros(0, len(place_G), p_PD.shape[1])
        )
        return distillation_share(
            q_QD,
            group_QGD,
            teacher_QG,
            temperature=self._loss.temperature,
            weight=1.0 / self._global_size,
            valid_BG=valid_QG,
        )


Shares = Mapping[str, Tensor]


def backward_in_one_pass(
    run: Callable[[int], Tensor], count: int, shares_of: Callable[[Tensor], Shares], engine: Engine
) -> Shares:
    """Every graph fits: embed, take the loss, go back through all of it at once."""
    parts = [run(i) for i in range(count)]
    leaf_ND = torch.cat(parts).detach().requires_grad_()
    shares = shares_of(leaf_ND)
    (grad_ND,) = torch.autograd.grad(shares["loss"], leaf_ND)
    engine.backward((torch.cat(parts) * grad_ND).sum(), last=True)
    return shares


def backward_in_two_passes(
    run: Callable[[int], Tensor], count: int, shares_of: Callable[[Tensor], Shares], engine: Engine
) -> Shares:
    """The same gradient with one micro-batch's activations at a time."""
    with torch.no_grad():  # 1. embed without a graph
        parts = [run(i) for i in range(count)]
    leaf_ND = torch.cat(parts).requires_grad_()  # 2. the loss sees every embedding at once
    shares = shares_of(leaf_ND)
    (grad_ND,) = torch.autograd.grad(shares["loss"], leaf_ND)
    for i, grad_BD in enumerate(grad_ND.split([len(part) for part in parts])):  # 3. embed again, and push it through
        engine.backward((run(i) * grad_BD).sum(), last=i == count - 1)
    return shares
