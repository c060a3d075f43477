"""The losses of Lodestar and of sentence-transformers, as their trainers use them, and two papers' formulas over ranks.

Shape suffixes as in problem.py; P passages of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.config import LossConfig
from contrastive.stage import FinetuneStage
from lodestar.config.schema import OptimConfig
from lodestar.data.padding import TextShape
from lodestar.distributed.collectives import sum_over_ranks
from lodestar.distributed.runtime import Runtime
from lodestar.training.ddp import DdpEngine
from tests.conformance import problem
from tests.conformance.problem import NARROW, WIDTH, Loss, Shard, Step, difference
from tests.step_batches import step_batch

CPU = torch.device("cpu")


# --- Lodestar --------------------------------------------------------------------------------


class UnitEncoder(nn.Module):
    """(texts, lengths) -> (unit embeddings, temperature), as BiEncoder."""

    def __init__(self, linear: nn.Linear, temperature: float) -> None:
        super().__init__()
        self.linear, self.temperature = linear, temperature

    def forward(self, x_BF: Tensor, lengths_B: Tensor, shape: TextShape) -> tuple[Tensor, float]:
        return F.normalize(self.linear(x_BF), dim=1), self.temperature


def lodestar(options: dict[str, Any], micro_size: int | None, linear: nn.Linear, shard: Shard) -> Tensor:
    """The stage of fine-tuning under DDP; `micro_size` queries or passages in a micro-batch, none: all in one."""
    module, counts = UnitEncoder(linear, shard.temperature), shard.counts
    engine = DdpEngine(module, Runtime(shard.rank, len(counts), shard.rank, CPU), OptimConfig(lr=1.0), "fp32", False)
    stage = FinetuneStage(
        loss=LossConfig(**options),
        global_size=sum(counts),
        seed=0,
        device=CPU,
        max_length=1,
        keep_graph=0.0,
        memory_bytes=0,
    )
    texts_NF = torch.cat([shard.q_BF, shard.p_BGF.flatten(0, 1)])
    texts_per_query = 1 + shard.p_BGF.shape[1]
    count = -(-texts_per_query * max(counts) // (micro_size or texts_per_query * max(counts)))  # the same on all ranks
    batch = step_batch(shard.rank, counts, shard.teacher_BG, texts_NF.tensor_split(count))
    loss = stage.backward(batch, engine, 0)["loss"]
    return sum_over_ranks(loss.detach())


def of_lodestar(micro_size: int | None = None, **options: Any) -> Step:
    return partial(lodestar, options, micro_size)


WIDTHS = {"matryoshka": [NARROW]}
LODESTAR = {
    "Lodestar": Loss(of_lodestar()),
    "Lodestar, GradCache": Loss(of_lodestar(micro_size=5)),
    "Lodestar, Matryoshka": Loss(of_lodestar(**WIDTHS), problem.matryoshka),
    "Lodestar, distillation": Loss(
        partial(difference, of_lodestar(distillation=1.0), of_lodestar()), problem.distillation
    ),
    "Lodestar, distillation with Matryoshka": Loss(
        partial(difference, of_lodestar(distillation=1.0, **WIDTHS), of_lodestar(**WIDTHS)),
        problem.matryoshka_distillation,
    ),
}


# --- sentence-transformers -------------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """Answers as a SentenceTransformer does."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.encoder(features["input_ids"])}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, place: int) -> nn.Module:
        return self.encoder


def sentence_transformers(
    build: Callable[..., nn.Module], options: dict[str, Any], linear: nn.Linear, shard: Shard
) -> Tensor:
    model = SentenceEncoder(DistributedDataParallel(linear))
    loss = build(model, scale=1 / shard.temperature, **options)
    value = loss([{"input_ids": x_BF} for x_BF in (shard.q_BF, *shard.p_BGF.unbind(1))], torch.empty(0))
    value.backward()
    return value


def matryoshka_loss(model: Any, **options: Any) -> nn.Module:
    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, **options), [WIDTH, NARROW])


GATHER = {"gather_across_devices": True}
CACHED: dict[str, Any] = {"mini_batch_size": 2}
SENTENCE_TRANSFORMERS = {
    "sentence-transformers MultipleNegativesRankingLoss": Loss(
        partial(sentence_transformers, MultipleNegativesRankingLoss, {})
    ),
    "sentence-transformers MultipleNegativesRankingLoss, gathered": Loss(
        partial(sentence_transformers, MultipleNegativesRankingLoss, GATHER)
    ),
    "sentence-transformers CachedMultipleNegativesRankingLoss": Loss(
        partial(sentence_transformers, CachedMultipleNegativesRankingLoss, CACHED)
    ),
    "sentence-transformers CachedMultipleNegativesRankingLoss, gathered": Loss(
        partial(sentence_transformers, CachedMultipleNegativesRankingLoss, CACHED | GATHER)
    ),
    "sentence-transformers MatryoshkaLoss, gathered": Loss(
        partial(sentence_transformers, matryoshka_loss, GATHER), problem.matryoshka
    ),
}


# --- papers ----------------------------------------------------------------------------------


def gathered_info_nce(linear: nn.Linear, shard: Shard) -> Tensor:
    """Each rank's queries against the passages of all ranks, with their gradient; DDP averages."""
    encoder = DistributedDataParallel(linear)
    q_BD, p_PD = (F.normalize(encoder(x_NF), dim=1) for x_NF in (shard.q_BF, shard.p_BGF.flatten(0, 1)))
    p_MD = torch.cat(differentiable.all_gather(p_PD))
    positive_B = shard.rank * len(p_PD) + shard.p_BGF.shape[1] * torch.arange(len(q_BD))
    loss = F.cross_entropy(q_BD @ p_MD.T / shard.temperature, positive_B)
    loss.backward()
    return loss


def gradcache(linear: nn.Linear, shard: Shard) -> Tensor:
    """Gao et al. 2021, section 3.2, with the cache computed from the embeddings of all ranks on each of them."""
    with torch.no_grad():
        local = linear(shard.q_BF), linear(shard.p_BGF)
    q_ND, p_NGD = (_all_gather(x).requires_grad_() for x in local)
    loss = problem.info_nce(q_ND, p_NGD, torch.empty(0), shard.temperature)
    grads = torch.autograd.grad(loss, [q_ND, p_NGD])
    for x_BF, grad in zip((shard.q_BF, shard.p_BGF), grads, strict=True):
        cache = grad[shard.rank * len(x_BF) :][: len(x_BF)]
        for part_BF, part in zip(x_BF.split(3), cache.split(3), strict=True):
            (linear(part_BF) * part).sum().backward()
    linear.weight.grad = sum_over_ranks(problem.gradient(linear))
    return loss


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


FORMULAS = {"InfoNCE, gathered": Loss(gathered_info_nce), "GradCache": Loss(gradcache)}


def scaled(step: Step, linear: nn.Linear, shard: Shard) -> Tensor:
    """The mistake to be found: a gradient that is summed over ranks instead of averaged."""
    loss = step(linear, shard)
    problem.gradient(linear).mul_(len(shard.counts))
    return loss
