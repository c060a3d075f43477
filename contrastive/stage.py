"""What one step of fine-tuning is: every query of the global batch against every passage of it, in two passes.

GradCache: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, Q queries, P passages of this rank, M passages of all ranks, G passages of one query, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive.collate import StepBatch
from contrastive.config import LossConfig
from contrastive.gradcache import KeepGraph, Scalars, Temperature, gradcache_backward
from contrastive.loss import LocalLoss, contrastive_local_loss, distillation_local_loss, matryoshka
from contrastive.negatives import Candidates, Direction, Texts
from lodestar import rng
from lodestar.distributed.collectives import gather_counts, gather_rows, rank
from lodestar.training.engine import Engine


class FinetuneStage:
    """loss = mean over the global batch of -log p(positive | query), plus what the recipe adds."""

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
        self._keep = KeepGraph(keep_graph, memory_bytes, max_length)

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Scalars:
        def run(i: int) -> tuple[Tensor, Temperature]:
            """Embed micro-batch i; the same step always draws the same dropout, so a second pass repeats the first."""
            rng.seed_everything(self._seed, "dropout", step, rank(), i)
            micro_batch = batch.micro_batches[i]
            unit_BD, temperature = engine.run(*micro_batch.tensors(self._device), last=i == count - 1)
            return unit_BD if micro_batch.real else unit_BD[:0], temperature

        count = len(batch.micro_batches)
        tokens = [micro_batch.ids_BL.numel() for micro_batch in batch.micro_batches]
        kept = count if batch.single_pass else self._keep.first(tokens, lambda texts: self._embed(engine, texts))
        return gradcache_backward(run, count, kept, lambda x_ND, t: self._scalars(batch, x_ND, t), engine)

    def _embed(self, engine: Engine, texts_BL: Tensor) -> object:
        lengths_B = torch.full((len(texts_BL),), texts_BL.shape[1])
        return engine.run(texts_BL.to(self._device), lengths_B.to(self._device), last=False)

    def _scalars(self, batch: StepBatch, sorted_ND: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """This rank's local loss and numbers to log, from its embeddings in the micro-batches' order."""
        x_ND = torch.empty_like(sorted_ND).index_copy(0, batch.place_N.to(self._device), sorted_ND)
        q_QD, p_PD = x_ND[: batch.rows], x_ND[batch.rows :]
        widths = [x_ND.shape[1], *self._loss.matryoshka]
        scalars: dict[str, Tensor] = {}
        for direction in self._directions(batch, q_QD, p_PD):
            found = [self._local_loss(direction, width, temperature, len(widths)) for width in widths]
            scalars[f"{direction.name}_loss"] = torch.stack([each.value for each in found]).sum()
            if direction.name == "query_to_passage":
                scalars |= {
                    "negatives_per_query": found[0].negatives / self._global_size,
                    "masked_false_negatives": found[0].masked.float(),
                    "accuracy": found[0].correct / self._global_size,
                }
        if self._loss.distillation:
            scalars["distillation_loss"] = self._distillation(batch, q_QD, p_PD, temperature)
        weights = {"query_to_passage": 1.0, **self._weights, "distillation": self._loss.distillation}
        scalars["loss"] = torch.stack(
            [w * scalars[f"{n}_loss"] for n, w in weights.items() if f"{n}_loss" in scalars]
        ).sum()
        if isinstance(temperature, Tensor):
            scalars["temperature"] = temperature.detach() * batch.rows / self._global_size
        return scalars

    @property
    def _weights(self) -> dict[str, float]:
        """Of the directions besides that from queries to passages."""
        names = ("passage_to_query", "query_to_query", "passage_to_passage")
        return {name: getattr(self._loss, name) for name in names if getattr(self._loss, name)}

    def _directions(self, batch: StepBatch, q_QD: Tensor, p_PD: Tensor) -> list[Direction]:
        """Who is scored against whom; queries are gathered over ranks only where a weight asks for them."""
        start_Q, query_Q, passage_P, owner_P = (
            x.to(self._device) for x in (batch.start_Q, batch.query_hash_Q, batch.passage_hash_P, batch.owner_P)
        )
        query, positive = Texts(query_Q, q_QD), Texts(passage_P[start_Q], p_PD[start_Q])
        passages = self._candidates(Texts(passage_P, p_PD), owner_P, start_Q, same_query_Q=query_Q)
        in_row_only_Q = torch.full_like(start_Q, not batch.in_batch_negatives, dtype=torch.bool)
        count_Q, none_Q = batch.count_Q.to(self._device), torch.zeros_like(start_Q)
        found = [Direction("query_to_passage", query, positive, passages, in_row_only_Q, count_Q)]
        if "passage_to_passage" in self._weights:
            found.append(Direction("passage_to_passage", positive, query, passages, in_row_only_Q, count_Q))
        if self._weights.keys() & {"passage_to_query", "query_to_query"}:
            place_Q = torch.arange(len(q_QD), device=self._device)
            queries = self._candidates(query, positive.hash_N, place_Q, same_query_Q=positive.hash_N)
            if "passage_to_query" in self._weights:
                found.append(Direction("passage_to_query", positive, query, queries, in_row_only_Q, none_Q))
            if "query_to_query" in self._weights:
                found.append(Direction("query_to_query", query, positive, queries, in_row_only_Q, none_Q))
        return found

    def _candidates(
        self, texts: Texts, owner_N: Tensor, positive_index_Q: Tensor, *, same_query_Q: Tensor
    ) -> Candidates:
        if not self._loss.share_negatives:
            return Candidates(texts, owner_N, positive_index_Q, same_query_Q)
        counts = gather_counts(len(owner_N))
        everywhere = Texts(gather_rows(texts.hash_N, counts), gather_rows(texts.x_ND, counts))
        return Candidates(
            everywhere, gather_rows(owner_N, counts), positive_index_Q + sum(counts[: rank()]), same_query_Q
        )

    def _local_loss(self, direction: Direction, width: int, temperature: Temperature, widths: int) -> LocalLoss:
        vectors = (direction.anchor.x_ND, direction.candidates.texts.x_ND, direction.answer.x_ND)
        anchor_QD, candidate_MD, answer_QD = (matryoshka(x, width) for x in vectors)
        return contrastive_local_loss(
            anchor_QD,
            candidate_MD,
            answer_QD,
            direction.mask(),
            temperature=temperature,
            weight=1.0 / (self._global_size * widths),
        )

    def _distillation(self, batch: StepBatch, q_QD: Tensor, p_PD: Tensor, temperature: Temperature) -> Tensor:
        teacher_QG = batch.teacher_QG.to(self._device)
        place_G = torch.arange(teacher_QG.shape[1], device=self._device)
        own_QG = batch.start_Q.to(self._device)[:, None] + place_G
        valid_QG = place_G < batch.count_Q.to(self._device)[:, None]
        group_QGD = (
            p_PD[own_QG.clamp(max=max(0, len(p_PD) - 1))]
            if len(p_PD)
            else p_PD.new_zeros(0, len(place_G), p_PD.shape[1])
        )
        return distillation_local_loss(
            q_QD,
            group_QGD,
            teacher_QG,
            temperature=temperature,
            weight=1.0 / self._global_size,
            valid_BG=valid_QG,
        )
