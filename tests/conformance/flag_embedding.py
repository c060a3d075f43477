"""FlagEmbedding's own model, beside the same formulas, in an environment of its own: `make conformance PEERS=1`.

    .venv-peers/bin/python -m tests.conformance.flag_embedding      prints the rows of the table as JSON

It needs transformers below 5. Shape suffixes as in problem.py.
"""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import torch
from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.conformance import problem
from tests.conformance.problem import NARROW, WIDTH, Loss, Shard, difference, table_of


class BaseModel(nn.Module):
    """Answers as a transformers encoder does: a text is one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x_BF: Tensor, attention_mask: Tensor, return_dict: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.linear(x_BF)[:, None])


def flag_embedding(
    linear: nn.Linear, shard: Shard, *, gathered: bool = True, teacher: bool = False, widths: bool = False
) -> Tensor:
    """A step under DDP, as its trainer takes it."""
    model = BiEncoderOnlyEmbedderModel(
        BaseModel(linear),
        negatives_cross_device=gathered,
        temperature=shard.temperature,
        normalize_embeddings=True,
        use_mrl=widths,
        mrl_dims=[WIDTH, NARROW] if widths else [],
    )
    queries, passages = (
        {"x_BF": x_NF, "attention_mask": torch.ones(len(x_NF), 1)} for x_NF in (shard.q_BF, shard.p_BGF.flatten(0, 1))
    )
    scores = shard.teacher_BG.flatten().tolist() if teacher else None
    wrapped = DistributedDataParallel(model)  # it reduces in the backward, so it must live until then
    loss = wrapped(queries, passages, teacher_scores=scores).loss
    loss.backward()
    return loss


LOSSES = {
    "FlagEmbedding contrastive": Loss(partial(flag_embedding, gathered=False)),
    "FlagEmbedding contrastive, gathered": Loss(flag_embedding),
    "FlagEmbedding Matryoshka, gathered": Loss(partial(flag_embedding, widths=True), problem.matryoshka),
    "FlagEmbedding distillation, gathered": Loss(
        partial(difference, partial(flag_embedding, teacher=True), flag_embedding), problem.distillation
    ),
    "FlagEmbedding distillation with Matryoshka, gathered": Loss(
        partial(difference, partial(flag_embedding, teacher=True, widths=True), partial(flag_embedding, widths=True)),
        problem.matryoshka_distillation,
    ),
}


if __name__ == "__main__":
    print(json.dumps(table_of(LOSSES)))
