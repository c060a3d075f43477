"""One step of fine-tuning: every query of the global batch against every passage of it, by GradCache.

GradCache: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, G queries of the global batch, Q queries of this rank's part, P their passages, M passages that
they are scored against, K passages of one query, B texts of a micro-batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from contrastive.collate import StepBatch
from contrastive.config import LossConfig
from contrastive.gradcache import KeepGraph, Scalars, Temperature, gradcache_backward
from contrastive.loss import LocalLoss, contrastive_local_loss, distillation_local_loss, matryoshka
from contrastive.negatives import NegativeMask
from lodestar import rng
from lodestar.data.padding import TextShape
from lodestar.distributed.collectives import gather_rows, rank
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
        batch = batch.to(self._device)
        count = batch.num_micro_batches

        def embed(i: int) -> tuple[Tensor, Temperature]:
            """Embeddings of micro-batch i; its dropout depends on nothing else: a second call gives the same."""
            rng.seed_everything(self._seed, "dropout", step, batch.numbers[i])
            unit_BD, temperature = engine.run(*batch.inputs(i), last=i == count - 1)
            return unit_BD if batch.is_real[i] else unit_BD[:0], temperature

        def losses_of(sorted_ND: Tensor, temperature: Temperature) -> Scalars:
            return self._scalars(batch, sorted_ND, temperature)

        if batch.keeps_all_graphs:
            num_graphs = count
        else:
            num_graphs = self._keep_graph.num_graphs(batch.tokens_of_rank, lambda ids_BL: self._embed(engine, ids_BL))
        return gradcache_backward(embed, count, num_graphs, losses_of, engine)

    def _embed(self, engine: Engine, ids_BL: Tensor) -> object:
        """Texts without padding, to measure the memory of their graph."""
        lengths_B = torch.full((len(ids_BL),), ids_BL.shape[1])
        shape = TextShape(ids_BL.shape[1], has_padding=False)
        return engine.run(ids_BL.to(self._device), lengths_B.to(self._device), shape, last=False)

    def _scalars(self, batch: StepBatch, own_ND: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """This rank's local loss and numbers to log, from the embeddings of its texts in the micro-batches' order."""
        all_ND, tensors = gather_rows(own_ND, batch.texts_per_rank), batch.tensors
        start, part = (
            sum(batch.passages_per_rank[: rank()]),
            slice(batch.first_query, batch.first_query + batch.examples),
        )
        candidates = slice(start, start + batch.passages_per_rank[rank()])
        if self._loss.share_negatives:
            start, candidates = 0, slice(None)
        # One selection, so that its backward writes the gradient of all embeddings once.
        places = tensors["query_place_G"][part], tensors["passage_place_M"][candidates]
        q_QD, p_MD = all_ND.index_select(0, torch.cat(places)).tensor_split([batch.examples])
        start_Q = tensors["start_Q"] - start
        scalars: dict[str, Tensor] = {}
        for name, anchor_QD, candidate_MD, answer_QD, mask in self._directions(batch, q_QD, p_MD, start_Q, all_ND):
            losses = self._local_losses(anchor_QD, candidate_MD, answer_QD, mask, temperature)
            scalars[f"{name}_loss"] = torch.stack([loss.value for loss in losses]).sum()
            if name == "query_to_passage":
                scalars |= {
                    "negatives_per_query": losses[0].negatives / self._global_size,
                    "masked_false_negatives": losses[0].masked.float(),
                    "accuracy": losses[0].correct / self._global_size,
                }
        if self._loss.distillation:
            scalars["distillation_loss"] = self._distillation(batch, q_QD, p_MD, start_Q, temperature)
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
        self, batch: StepBatch, q_QD: Tensor, p_MD: Tensor, start_Q: Tensor, all_ND: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None, NegativeMask]]:
        """(name, anchors, candidates, answers, mask) of each loss term; no answers where they are candidates."""
        tensors, weights = batch.tensors, self._weights
        query_hash_Q = tensors["query_hash_Q"]
        passage_hash_M, owner_M = self._gathered(batch.passages_per_rank, tensors["passage_hash_P"], tensors["owner_P"])
        positive_hash_Q = passage_hash_M.index_select(0, start_Q)

        def masks(
            same_Q: Tensor, candidate_M: Tensor, owner_M: Tensor, start_Q: Tensor, end_Q: Tensor
        ) -> Callable[..., NegativeMask]:
            return partial(
                NegativeMask,
                same_query_B=same_Q,
                candidate_M=candidate_M,
                owner_M=owner_M,
                positive_index_B=start_Q,
                in_row_only=not batch.in_batch_negatives,
                start_B=start_Q,
                end_B=end_Q,
            )

        of_passages = masks(query_hash_Q, passage_hash_M, owner_M, start_Q, start_Q + tensors["count_Q"])
        yield "query_to_passage", q_QD, p_MD, None, of_passages(anchor_B=query_hash_Q, answer_B=positive_hash_Q)
        if not weights.keys() & {"passage_to_passage", "passage_to_query", "query_to_query"}:
            return
        positive_QD = p_MD.index_select(0, start_Q)
        query, positive = (query_hash_Q, q_QD), (positive_hash_Q, positive_QD)
        directions = [("passage_to_passage", positive, query, p_MD, of_passages)]
        if weights.keys() & {"passage_to_query", "query_to_query"}:
            queries_GD, index_Q = self._queries(batch, q_QD, all_ND)
            hash_G, owner_G = self._gathered(batch.queries_per_rank, query_hash_Q, positive_hash_Q)
            of_queries = masks(positive_hash_Q, hash_G, owner_G, index_Q, index_Q)
            directions += [
                ("passage_to_query", positive, (query_hash_Q, None), queries_GD, of_queries),
                ("query_to_query", query, positive, queries_GD, of_queries),
            ]
        for name, (anchor_hash_Q, anchor_QD), (answer_hash_Q, answer_QD), candidate_MD, mask in directions:
            if name in weights:
                yield name, anchor_QD, candidate_MD, answer_QD, mask(anchor_B=anchor_hash_Q, answer_B=answer_hash_Q)

    def _gathered(self, counts: Sequence[int], *hashes: Tensor) -> Sequence[Tensor]:
        """Of the candidates of all ranks, or of this rank only."""
        if not self._loss.share_negatives:
            return hashes
        return gather_rows(torch.stack(hashes, 1), counts).unbind(1)

    def _queries(self, batch: StepBatch, q_QD: Tensor, all_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The queries as candidates, and the index of this rank's own among them."""
        index_Q = torch.arange(batch.examples, device=self._device)
        if not self._loss.share_negatives:
            return q_QD, index_Q
        return all_ND.index_select(0, batch.tensors["query_place_G"]), index_Q + batch.first_query

    def _local_losses(
        self,
        anchor_QD: Tensor,
        candidate_MD: Tensor,
        answer_QD: Tensor | None,
        mask: NegativeMask,
        temperature: Temperature,
    ) -> list[LocalLoss]:
        """Local losses at the full width and at each Matryoshka width."""
        widths = self._widths(anchor_QD)
        weight = 1.0 / (self._global_size * len(widths))
        losses: list[LocalLoss] = []
        for width in widths:
            a_QD, d_MD = matryoshka(anchor_QD, width), matryoshka(candidate_MD, width)
            p_QD = None if answer_QD is None else matryoshka(answer_QD, width)
            losses.append(contrastive_local_loss(a_QD, d_MD, p_QD, mask, temperature=temperature, weight=weight))
        return losses

    def _distillation(
        self, batch: StepBatch, q_QD: Tensor, p_MD: Tensor, start_Q: Tensor, temperature: Temperature
    ) -> Tensor:
        """Local loss: the mean over the full width and each Matryoshka width, as FlagEmbedding's."""
        teacher_QK = batch.tensors["teacher_QK"]
        position_K = torch.arange(teacher_QK.shape[1], device=self._device)
        passage_index_QK = (start_Q[:, None] + position_K).clamp(max=len(p_MD) - 1)
        valid_QK = position_K < batch.tensors["count_Q"][:, None]
        widths = self._widths(q_QD)
        losses: list[Tensor] = []
        for width in widths:
            short_QD, short_MD = (matryoshka(x, width) for x in (q_QD, p_MD))
            group_QKD = short_MD.index_select(0, passage_index_QK.flatten()).unflatten(0, passage_index_QK.shape)
            losses.append(
                distillation_local_loss(
                    short_QD,
                    group_QKD,
                    teacher_QK,
                    temperature=temperature,
                    weight=1.0 / (self._global_size * len(widths)),
                    valid_BG=valid_QK,
                )
            )
        return torch.stack(losses).sum()

    def _widths(self, x_ND: Tensor) -> list[int]:
        """At which each loss term is computed: the full width, then the Matryoshka widths."""
        return [x_ND.shape[1], *self._loss.matryoshka]
