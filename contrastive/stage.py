"""One step of fine-tuning: every query of the global batch against every passage of it, by GradCache.

GradCache: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, Q queries, P passages of this rank, M passages of all ranks, G passages of one query, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from contrastive.collate import StepBatch
from contrastive.config import LossConfig
from contrastive.gradcache import KeepGraph, Scalars, Temperature, gradcache_backward
from contrastive.loss import LocalLoss, contrastive_local_loss, distillation_local_loss, matryoshka
from contrastive.negatives import NegativeMask
from lodestar import rng
from lodestar.distributed.collectives import gather_counts, gather_rows, rank
from lodestar.training.engine import Engine


class FinetuneStage:
    """loss = mean over the global batch of -log p(positive | query), plus the recipe's other loss terms."""

    def __init__(
        self,
        *,
        loss: LossConfig,
        global_size: int,
        seed: int,
        device: torch.device,
        max_length: int,
        keep_graph: float,
        memory_bytes: int,
    ) -> None:
        self._loss, self._global_size, self._seed, self._device = loss, global_size, seed, device
        self._keep_graph = KeepGraph(keep_graph, memory_bytes, max_length)

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Scalars:
        def embed(i: int) -> tuple[Tensor, Temperature]:
            """Embeddings of micro-batch i; dropout depends on step, rank and i alone: a second call gives the same."""
            rng.seed_everything(self._seed, "dropout", step, rank(), i)
            micro_batch = batch.micro_batches[i]
            unit_BD, temperature = engine.run(*micro_batch.tensors(self._device), last=i == count - 1)
            return unit_BD if micro_batch.is_real else unit_BD[:0], temperature

        def losses_of(sorted_ND: Tensor, temperature: Temperature) -> Scalars:
            return self._scalars(batch, sorted_ND, temperature)

        count = len(batch.micro_batches)
        if batch.keep_all_graphs:
            num_graphs = count
        else:
            tokens = [micro_batch.ids_BL.numel() for micro_batch in batch.micro_batches]
            num_graphs = self._keep_graph.num_graphs(tokens, lambda ids_BL: self._embed(engine, ids_BL))
        return gradcache_backward(embed, count, num_graphs, losses_of, engine)

    def _embed(self, engine: Engine, ids_BL: Tensor) -> object:
        """Texts without padding, to measure the memory of their graph."""
        lengths_B = torch.full((len(ids_BL),), ids_BL.shape[1])
        return engine.run(ids_BL.to(self._device), lengths_B.to(self._device), last=False)

    def _scalars(self, batch: StepBatch, sorted_ND: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """This rank's local loss and numbers to log, from its embeddings in the micro-batches' order."""
        x_ND = torch.empty_like(sorted_ND).index_copy(0, batch.text_index_N.to(self._device), sorted_ND)
        q_QD, p_PD = x_ND[: batch.examples], x_ND[batch.examples :]
        scalars: dict[str, Tensor] = {}
        for name, anchor_QD, candidate_MD, answer_QD, mask in self._directions(batch, q_QD, p_PD):
            losses = self._local_losses(anchor_QD, candidate_MD, answer_QD, mask, temperature)
            scalars[f"{name}_loss"] = torch.stack([loss.value for loss in losses]).sum()
            if name == "query_to_passage":
                scalars |= {
                    "negatives_per_query": losses[0].negatives / self._global_size,
                    "masked_false_negatives": losses[0].masked.float(),
                    "accuracy": losses[0].correct / self._global_size,
                }
        if self._loss.distillation:
            scalars["distillation_loss"] = self._distillation(batch, q_QD, p_PD, temperature)
        terms = [weight * scalars[f"{name}_loss"] for name, weight in self._weights.items()]
        scalars["loss"] = torch.stack(terms).sum()
        if isinstance(temperature, Tensor):
            scalars["temperature"] = temperature.detach() * batch.examples / self._global_size
        return scalars

    @property
    def _weights(self) -> dict[str, float]:
        """Weights of the loss terms in use."""
        loss = self._loss
        weights = {
            "query_to_passage": 1.0,
            "passage_to_query": loss.passage_to_query,
            "query_to_query": loss.query_to_query,
            "passage_to_passage": loss.passage_to_passage,
            "distillation": loss.distillation,
        }
        return {name: weight for name, weight in weights.items() if weight}

    def _directions(
        self, batch: StepBatch, q_QD: Tensor, p_PD: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, NegativeMask]]:
        """(name, anchors, candidates, answers, mask) of each loss term; gathers queries only if a term needs them."""
        start_Q, count_Q, query_hash_Q, passage_hash_P, owner_P = (
            x.to(self._device)
            for x in (batch.start_Q, batch.count_Q, batch.query_hash_Q, batch.passage_hash_P, batch.owner_P)
        )
        weights, positive_hash_Q = self._weights, passage_hash_P[start_Q]
        query, positive = (query_hash_Q, q_QD), (positive_hash_Q, p_PD[start_Q])
        mask = partial(NegativeMask, in_row_only=not batch.in_batch_negatives)
        passages = self._candidates(
            passage_hash_P, p_PD, owner_P, start_Q, count_Q, partial(mask, same_query_B=query_hash_Q)
        )
        directions = [
            ("query_to_passage", query, positive, passages),
            ("passage_to_passage", positive, query, passages),
        ]
        if weights.keys() & {"passage_to_query", "query_to_query"}:
            index_Q, zero_Q = torch.arange(len(q_QD), device=self._device), torch.zeros_like(start_Q)
            mask = partial(mask, same_query_B=positive_hash_Q)
            queries = self._candidates(query_hash_Q, q_QD, positive_hash_Q, index_Q, zero_Q, mask)
            directions += [
                ("passage_to_query", positive, query, queries),
                ("query_to_query", query, positive, queries),
            ]
        for name, (anchor_hash_Q, anchor_QD), (answer_hash_Q, answer_QD), (candidate_MD, mask) in directions:
            if name in weights:
                yield name, anchor_QD, candidate_MD, answer_QD, mask(anchor_B=anchor_hash_Q, answer_B=answer_hash_Q)

    def _candidates(
        self,
        hash_N: Tensor,
        x_ND: Tensor,
        owner_N: Tensor,
        positive_index_Q: Tensor,
        count_Q: Tensor,
        mask: partial[NegativeMask],
    ) -> tuple[Tensor, partial[NegativeMask]]:
        """Embeddings of the candidates of all ranks, or of this rank only, and the mask without its anchors."""
        if self._loss.share_negatives:
            counts = gather_counts(len(owner_N))
            hash_N, x_ND, owner_N = (gather_rows(x, counts) for x in (hash_N, x_ND, owner_N))
            positive_index_Q = positive_index_Q + sum(counts[: rank()])
        return x_ND, partial(
            mask,
            candidate_M=hash_N,
            owner_M=owner_N,
            positive_index_B=positive_index_Q,
            start_B=positive_index_Q,
            end_B=positive_index_Q + count_Q,
        )

    def _local_losses(
        self, anchor_QD: Tensor, candidate_MD: Tensor, answer_QD: Tensor, mask: NegativeMask, temperature: Temperature
    ) -> list[LocalLoss]:
        """Local losses at the full width and at each Matryoshka width."""
        widths = self._widths(anchor_QD)
        weight = 1.0 / (self._global_size * len(widths))
        losses: list[LocalLoss] = []
        for width in widths:
            a_QD, d_MD, p_QD = (matryoshka(x, width) for x in (anchor_QD, candidate_MD, answer_QD))
            losses.append(contrastive_local_loss(a_QD, d_MD, p_QD, mask, temperature=temperature, weight=weight))
        return losses

    def _distillation(self, batch: StepBatch, q_QD: Tensor, p_PD: Tensor, temperature: Temperature) -> Tensor:
        """Local loss: the mean over the full width and each Matryoshka width, as FlagEmbedding's."""
        teacher_QG = batch.teacher_QG.to(self._device)
        position_G = torch.arange(teacher_QG.shape[1], device=self._device)
        passage_index_QG = batch.start_Q.to(self._device)[:, None] + position_G
        valid_QG = position_G < batch.count_Q.to(self._device)[:, None]
        widths = self._widths(q_QD)
        losses: list[Tensor] = []
        for width in widths:
            short_QD, short_PD = (matryoshka(x, width) for x in (q_QD, p_PD))
            group_QGD = (
                short_PD[passage_index_QG.clamp(max=max(0, len(p_PD) - 1))]
                if len(p_PD)
                else short_PD.new_zeros(0, len(position_G), width)
            )
            losses.append(
                distillation_local_loss(
                    short_QD,
                    group_QGD,
                    teacher_QG,
                    temperature=temperature,
                    weight=1.0 / (self._global_size * len(widths)),
                    valid_BG=valid_QG,
                )
            )
        return torch.stack(losses).sum()

    def _widths(self, x_ND: Tensor) -> list[int]:
        """At which each loss term is computed: the full width, then the Matryoshka widths."""
        return [x_ND.shape[1], *self._loss.matryoshka]
