"""What one step of fine-tuning is: every query of the global batch against every passage of it, in two passes.

The cached step: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", 3.2.
Shape suffixes: N texts, Q queries, P passages of this rank, M passages of all ranks, G passages of one query, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chassis import chance
from chassis.collectives import gather_counts, gather_rows, rank
from chassis.engine import Engine
from contrastive.collate import StepBatch
from contrastive.config import Loss
from contrastive.loss import Identity, Share, contrastive_share, distillation_share, matryoshka

Shares = Mapping[str, Tensor]
Temperature = Tensor | float


class FinetuneStage:
    """loss = mean over the global batch of -log p(positive | query), plus what the recipe adds."""

    def __init__(
        self,
        *,
        loss: Loss,
        global_size: int,
        seed: int,
        device: torch.device,
        max_length: int,
        keep_graph: float,
        memory_bytes: int,
    ) -> None:
        self._loss, self._global_size, self._seed, self._device = loss, global_size, seed, device
        self._keep = KeepGraph(keep_graph, memory_bytes, max_length)

    def backward(self, batch: StepBatch, engine: Engine, step: int) -> Shares:
        def run(i: int) -> tuple[Tensor, Temperature]:
            """Embed micro-batch i; the same step always draws the same dropout, so a second pass repeats the first."""
            chance.seed_everything(self._seed, "dropout", step, rank(), i)
            micro_batch = batch.micro_batches[i]
            unit_BD, temperature = engine.run(*micro_batch.tensors(self._device), last=i == count - 1)
            return unit_BD if micro_batch.real else unit_BD[:0], temperature

        count = len(batch.micro_batches)
        tokens = [micro_batch.ids_BL.numel() for micro_batch in batch.micro_batches]
        kept = count if batch.single_pass else self._keep.first(tokens, lambda texts: self._embed(engine, texts))
        return cached_backward(run, count, kept, lambda x_ND, t: self._shares(batch, x_ND, t), engine)

    def _embed(self, engine: Engine, texts_BL: Tensor) -> object:
        lengths_B = torch.full((len(texts_BL),), texts_BL.shape[1])
        return engine.run(texts_BL.to(self._device), lengths_B.to(self._device), last=False)

    def _shares(self, batch: StepBatch, sorted_ND: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """This rank's shares of the loss and of the numbers to log, from its embeddings in the micro-batches' order."""
        x_ND = torch.empty_like(sorted_ND).index_copy(0, batch.place_N.to(self._device), sorted_ND)
        q_QD, p_PD = x_ND[: batch.rows], x_ND[batch.rows :]
        widths = [x_ND.shape[1], *self._loss.matryoshka]
        shares: dict[str, Tensor] = {}
        for direction in self._directions(batch, q_QD, p_PD):
            found = [self._share(direction, width, temperature, len(widths)) for width in widths]
            shares[f"{direction.name}_loss"] = torch.stack([each.value for each in found]).sum()
            if direction.name == "query_to_passage":
                shares |= {
                    "negatives_per_query": found[0].negatives / self._global_size,
                    "hidden_pairs": found[0].hidden.float(),
                    "accuracy": found[0].correct / self._global_size,
                }
        if self._loss.distillation:
            shares["distillation_loss"] = self._distillation(batch, q_QD, p_PD, temperature)
        weights = {"query_to_passage": 1.0, **self._weights, "distillation": self._loss.distillation}
        shares["loss"] = torch.stack(
            [w * shares[f"{n}_loss"] for n, w in weights.items() if f"{n}_loss" in shares]
        ).sum()
        if isinstance(temperature, Tensor):
            shares["temperature"] = temperature.detach() * batch.rows / self._global_size
        return shares

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
        passages = self._candidates(Texts(passage_P, p_PD), owner_P, start_Q, kin_Q=query_Q)
        alone_Q = torch.full_like(start_Q, batch.alone, dtype=torch.bool)
        count_Q, none_Q = batch.count_Q.to(self._device), torch.zeros_like(start_Q)
        found = [Direction("query_to_passage", query, positive, passages, alone_Q, count_Q)]
        if "passage_to_passage" in self._weights:
            found.append(Direction("passage_to_passage", positive, query, passages, alone_Q, count_Q))
        if self._weights.keys() & {"passage_to_query", "query_to_query"}:
            place_Q = torch.arange(len(q_QD), device=self._device)
            queries = self._candidates(query, positive.hash_N, place_Q, kin_Q=positive.hash_N)
            if "passage_to_query" in self._weights:
                found.append(Direction("passage_to_query", positive, query, queries, alone_Q, none_Q))
            if "query_to_query" in self._weights:
                found.append(Direction("query_to_query", query, positive, queries, alone_Q, none_Q))
        return found

    def _candidates(self, texts: Texts, owner_N: Tensor, own_Q: Tensor, *, kin_Q: Tensor) -> Candidates:
        if not self._loss.share_negatives:
            return Candidates(texts, owner_N, own_Q, kin_Q)
        counts = gather_counts(len(owner_N))
        everywhere = Texts(gather_rows(texts.hash_N, counts), gather_rows(texts.x_ND, counts))
        return Candidates(everywhere, gather_rows(owner_N, counts), own_Q + sum(counts[: rank()]), kin_Q)

    def _share(self, direction: Direction, width: int, temperature: Temperature, widths: int) -> Share:
        vectors = (direction.anchor.x_ND, direction.candidates.texts.x_ND, direction.answer.x_ND)
        anchor_QD, candidate_MD, answer_QD = (matryoshka(x, width) for x in vectors)
        return contrastive_share(
            anchor_QD,
            candidate_MD,
            answer_QD,
            direction.identity(),
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
        return distillation_share(
            q_QD,
            group_QGD,
            teacher_QG,
            temperature=temperature,
            weight=1.0 / self._global_size,
            valid_BG=valid_QG,
        )


class Texts(NamedTuple):
    """Queries or passages: what they say, by hash, and their embeddings."""

    hash_N: Tensor
    x_ND: Tensor


@dataclass(frozen=True)
class Candidates:
    """Texts of all ranks that can be negatives."""

    texts: Texts
    owner_M: Tensor
    own_Q: Tensor
    """Where this rank's queries, or their positives, are among them."""
    kin_Q: Tensor
    """The owner that makes a candidate no negative, for each of this rank's queries."""


@dataclass(frozen=True)
class Direction:
    """Anchors, each with its answer, against candidates."""

    name: str
    anchor: Texts
    answer: Texts
    candidates: Candidates
    alone_Q: Tensor
    count_Q: Tensor
    """How many candidates, from its own on, an anchor sees that is alone."""

    def identity(self) -> Identity:
        of = self.candidates
        return Identity(
            anchor_B=self.anchor.hash_N,
            answer_B=self.answer.hash_N,
            kin_B=of.kin_Q,
            candidate_M=of.texts.hash_N,
            owner_M=of.owner_M,
            own_B=of.own_Q,
            alone_B=self.alone_Q,
            start_B=of.own_Q,
            end_B=of.own_Q + self.count_Q,
        )


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


def cached_backward(
    run: Callable[[int], tuple[Tensor, Temperature]],
    count: int,
    kept: int,
    shares_of: Callable[[Tensor, Temperature], Shares],
    engine: Engine,
) -> Shares:
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
    shares = shares_of(leaf_ND, temperature)
    grad_ND, *grad_temperature = torch.autograd.grad(shares["loss"], leaves)
    grads = grad_ND.split([len(unit_BD) for unit_BD, _ in first])
    # 3. push it through: all kept graphs at once, because ZeRO-3 loses gradients otherwise, then one by one
    for i in range(max(0, kept - 1), count):
        parts, grads_i = (first[:kept], grads[:kept]) if i < kept else ([run(i)], grads[i : i + 1])
        share = (torch.cat([unit_BD for unit_BD, _ in parts]) * torch.cat(grads_i)).sum()
        last = i == count - 1
        engine.backward(share + sum(parts[-1][1] * grad for grad in grad_temperature) if last else share, last=last)
    return shares
