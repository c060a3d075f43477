"""One optimizer step of either stage on real ranks, and the same step by plain formulas in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive.config import FinetuneRecipe
from contrastive.task import build_task as build_finetune_task
from lodestar.config import loader
from lodestar.config.schema import BatchPlan
from lodestar.distributed.runtime import Runtime
from lodestar.training.build_engine import build
from lodestar.training.task import TrainingTask
from retromae.config import PretrainRecipe
from retromae.masks import IGNORED, decoder_visibility
from retromae.task import build_task as build_pretrain_task
from tests import tiny

ROWS = 19  # divides by none of the world sizes
BETA = 0.9

Outcome = tuple[float, dict[str, Tensor]]
"""Loss of the global batch, and its gradient by parameter."""


def recipe(stage: str, folder: Path, *overrides: str) -> Any:
    """A recipe of the tiny fixture; makes what is not there yet."""
    if not (folder / "bert").exists():
        tiny.encoder(folder / "bert", "bert", layers=1, width=16, std=0.3)
    data = folder / f"{stage}.jsonl"
    if not data.exists():
        tiny.pretrain_file(data) if stage == "pretrain" else tiny.finetune_file(data, scores=True)
    values = f"""
run: {{output_dir: {folder}/runs/{stage}}}
model: {{encoder: {folder}/bert, max_length: 32}}
data: {{train: [{data}], cache_dir: {folder}/cache, workers: 0, processes: 1}}
batch: {{global_size: {ROWS}, micro_size: 4}}
optim: {{lr: 1e-3, betas: [{BETA}, 0.999], clip_norm: 0}}
schedule: {{steps: 2, warmup_ratio: 0}}
precision: fp32
engine: {{kind: ddp, zero3_persistence_threshold: 0}}
{"loss: {temperature: 0.1}" if stage == "finetune" else ""}
"""
    path = folder / f"{stage}.yaml"
    if not path.exists():
        path.write_text(values)
    return loader.load(PretrainRecipe if stage == "pretrain" else FinetuneRecipe, path, overrides)


def built(made: Any, rank: int, size: int) -> tuple[TrainingTask, Runtime]:
    runtime = Runtime(rank, size, rank, torch.device("cpu"))
    build_task = build_pretrain_task if isinstance(made, PretrainRecipe) else build_finetune_task
    return build_task(made, runtime), runtime


def step(rank: int, size: int, stage: str, folder: Path, *overrides: str) -> Outcome:
    return one_step(rank, size, recipe(stage, folder, *overrides))[0]


def one_step(rank: int, size: int, made: Any) -> tuple[Outcome, dict[str, float]]:
    """A real step by `size` ranks, and the scalars of the global batch.

    AdamW's first moment after it is (1 - beta) times the gradient, under any engine.
    """
    from lodestar.distributed.collectives import sum_over_ranks

    task, runtime = built(made, rank, size)
    engine = build(task.module, runtime, made.engine, made.optim, made.precision)
    engine.module.train()
    shares = task.stage.backward(next(task.batches(0)), engine, 0)
    scalars = {name: float(sum_over_ranks(share.detach().double())) for name, share in shares.items()}
    engine.step(1.0)
    gradient = {
        name.removesuffix(":exp_avg"): value.double() / (1 - made.optim.betas[0])
        for name, value in engine.optimizer_state().items()
        if name.endswith(":exp_avg")
    }
    return (scalars["loss"], gradient), scalars


def steps(rank: int, size: int, folder: Path, jobs: list[tuple[str, ...]]) -> list[Outcome]:
    """Several steps in one world; a job is (stage, *overrides)."""
    return [step(rank, size, stage, folder, *overrides) for stage, *overrides in jobs]


def plain_pretrain(folder: Path, *overrides: str) -> Outcome:
    """RetroMAE's loss on the whole batch at once, in fp64, with torch's own cross-entropy on whole logits."""
    made = recipe("pretrain", folder, *overrides, f"batch.micro_size={ROWS}")
    task, _ = built(made, 0, 1)
    (batch,) = next(task.batches(0)).micro_batches
    model: Any = task.module.double().eval()
    place = torch.arange(batch.input_ids_BL.shape[1])
    attention = (place < batch.lengths_B[:, None]).long()
    out = model.encoder(input_ids=batch.masked_input_ids_BL, attention_mask=attention, output_hidden_states=True)
    first = F.cross_entropy(out.logits.flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORED)
    visible = decoder_visibility(
        batch.words_BL, batch.lengths_B, batch.rng_key_B, made.mask.decoder, made.mask.decoder_sets
    )
    rebuilt = model._decode(out.hidden_states[-1][:, 0], batch.input_ids_BL, place, visible)
    labels = batch.input_ids_BL.masked_fill((place == 0) | (place >= batch.lengths_B[:, None] - 1), IGNORED)
    second = F.cross_entropy(model.encoder.cls(rebuilt).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    third = torch.zeros((), dtype=torch.float64)
    for logits, ids, words in zip(out.logits, batch.input_ids_BL, batch.words_BL, strict=True):
        largest = logits[words >= 0].amax(0).log_softmax(0)
        third = third - largest[ids[words >= 0].unique()].mean() / ROWS
    return _outcome(model, first + second + made.loss.bag_of_words * third)


def plain_finetune(folder: Path, *overrides: str) -> Outcome:
    """InfoNCE on the whole score matrix, in fp64."""
    made = recipe("finetune", folder, *overrides, f"batch.micro_size={ROWS}")
    task, _ = built(made, 0, 1)
    batch = next(task.batches(0))
    model: Any = task.module.double().eval()
    texts = [ids for micro_batch in batch.micro_batches for ids in _embed(model, micro_batch)]
    vectors = torch.stack([texts[i] for i in batch.text_index_N.argsort()])
    q, d = vectors[:ROWS], vectors[ROWS:]
    t = made.loss.temperature if model.log_temperature is None else model.log_temperature.exp()
    widths = [q.shape[1], *made.loss.matryoshka]
    narrow = [[F.normalize(x[:, :width], dim=1) for x in (q, d)] for width in widths]
    loss = sum(_directions(q, d, batch.start_Q, t, made.loss) for q, d in narrow) / len(widths)
    scores = q @ d.T / t
    if made.loss.distillation:
        groups = batch.teacher_QG.shape[1]
        student = torch.stack([scores[i, batch.start_Q[i] : batch.start_Q[i] + groups] for i in range(ROWS)])
        teacher = batch.teacher_QG.double().softmax(1)
        loss = loss + made.loss.distillation * F.kl_div(student.log_softmax(1), teacher, reduction="batchmean")
    return _outcome(model, loss)


def _directions(q: Tensor, d: Tensor, positive: Tensor, t: Any, loss: Any) -> Tensor:
    """All scores of each direction at once; no two texts of the fixture are equal."""
    p, place = d[positive], torch.arange(len(q))
    answer = (q * p).sum(1, keepdim=True) / t

    def against(anchor: Tensor, others: Tensor, own: Tensor) -> Tensor:
        negatives = (anchor @ others.T / t).scatter(1, own[:, None], -torch.inf)
        return F.cross_entropy(torch.cat([answer, negatives], 1), torch.zeros_like(own))

    return (
        F.cross_entropy(q @ d.T / t, positive)
        + loss.passage_to_query * against(p, q, place)
        + loss.query_to_query * against(q, q, place)
        + loss.passage_to_passage * against(p, d, positive)
    )


def _embed(model: Any, micro_batch: Any) -> Tensor:
    attention = torch.arange(micro_batch.ids_BL.shape[1]) < micro_batch.lengths_B[:, None]
    hidden = model.encoder(input_ids=micro_batch.ids_BL, attention_mask=attention.long()).last_hidden_state
    return F.normalize(hidden[:, 0], dim=1)


def _outcome(model: Any, loss: Tensor) -> Outcome:
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Outcome, wanted: Outcome) -> float:
    """The larger of the relative errors of the loss and of the gradient as one vector."""
    loss, gradient = found
    assert gradient.keys() == wanted[1].keys()
    flat, right = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (gradient, wanted[1]))
    return max(abs(loss - wanted[0]) / abs(wanted[0]), float((flat - right).norm() / right.norm()))


def expected_rows(size: int) -> list[int]:
    return BatchPlan(ROWS, size, 4).examples_per_rank
