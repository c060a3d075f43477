"""One optimizer step of either stage on real ranks, and the same step by plain formulas in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan as plan_finetune
from contrastive.task import build_task as build_finetune_task
from lodestar.config import loader
from lodestar.config.schema import BatchPlan
from lodestar.distributed.runtime import Runtime
from lodestar.training.build_engine import build
from lodestar.training.task import TrainingTask
from retromae.config import PretrainRecipe
from retromae.masks import IGNORED, decoder_visibility
from retromae.plan import plan as plan_pretrain
from retromae.task import build_task as build_pretrain_task
from tests import tiny

GLOBAL_SIZE = 19  # divides by none of the world sizes
BETA = 0.9
ENGINES = {
    "ddp": ("engine.kind=ddp",),
    **{f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)},
}
"""Overrides that choose each engine."""
WHOLE = (f"batch.micro_size={GLOBAL_SIZE}", "model.attention=padded")
"""Overrides for plain formulas: the whole batch at once, padded."""

Outcome = tuple[float, dict[str, Tensor]]
"""Loss of the global batch, and its gradient by parameter."""


def recipe(stage: str, folder: Path, *overrides: str) -> Any:
    """A recipe on a tiny encoder and tiny data, which the first call creates: before ranks start.

    In a process group transformers saves a model on rank 0 alone.
    """
    if not (folder / "bert").exists():
        assert not dist.is_initialized() or dist.get_world_size() == 1, "call steps.recipe before the ranks start"
        tiny.encoder(folder / "bert", "bert", layers=1, width=16, std=0.3)
    data = folder / f"{stage}.jsonl"
    if not data.exists():
        tiny.pretrain_file(data) if stage == "pretrain" else tiny.finetune_file(data, scores=True)
    values = f"""
run: {{output_dir: {folder}/runs/{stage}}}
model: {{encoder: {folder}/bert, max_length: 32}}
data: {{train: [{data}], cache_dir: {folder}/cache, workers: 0, processes: 1}}
batch: {{global_size: {GLOBAL_SIZE}, micro_size: 4}}
optim: {{lr: 1e-3, betas: [{BETA}, 0.999], clip_norm: 0}}
schedule: {{steps: 2, warmup_ratio: 0}}
precision: fp32
engine: {{kind: ddp, zero3_persistence_threshold: 0}}
{"loss: {temperature: 0.1}" if stage == "finetune" else ""}
"""
    limits = [override for override in overrides if override.startswith("batch.micro_")]
    overrides = (*(override for override in overrides if override not in limits), *limits[-1:])  # the last one counts
    path = folder / f"{stage}.yaml"
    if not path.exists():
        path.write_text(values)
    return loader.load(PretrainRecipe if stage == "pretrain" else FinetuneRecipe, path, overrides)


def built_task(run_recipe: Any, rank: int, size: int, device: str = "cpu") -> tuple[TrainingTask, Runtime]:
    runtime = Runtime(rank, size, rank, torch.device(device))
    build_task = build_pretrain_task if isinstance(run_recipe, PretrainRecipe) else build_finetune_task
    return build_task(run_recipe, runtime), runtime


def planned(run_recipe: Any) -> dict[str, Any]:
    """The plan of a recipe on one rank."""
    plan = plan_pretrain if isinstance(run_recipe, PretrainRecipe) else plan_finetune
    return plan(run_recipe, 1, None)


def step(rank: int, size: int, stage: str, folder: Path, *overrides: str) -> Outcome:
    return one_step(rank, size, recipe(stage, folder, *overrides))[0]


def one_step(rank: int, size: int, run_recipe: Any, device: str = "cpu") -> tuple[Outcome, dict[str, float]]:
    """A real step by `size` ranks, and the scalars of the global batch.

    AdamW's first moment after it is (1 - beta) times the gradient, under any engine.
    """
    from lodestar.distributed.collectives import max_over_ranks, sum_over_ranks

    task, runtime = built_task(run_recipe, rank, size, device)
    engine = build(task.module, runtime, run_recipe.engine, run_recipe.optim, run_recipe.precision)
    engine.module.train()
    batch = next(task.batches(0))
    for _ in range(16):  # under fp16 a step is skipped until its loss scale fits
        local_scalars = task.stage.backward(batch, engine, 0)
        scalars = {name: float(sum_over_ranks(scalar.detach().double())) for name, scalar in local_scalars.items()}
        if not float(engine.step(1.0).skipped):
            break
    gradient = {
        name.removesuffix(":exp_avg"): value.double() / (1 - run_recipe.optim.betas[0])
        for name, value in on_all(engine.optimizer_state()).items()
        if name.endswith(":exp_avg")
    }
    for parameter in engine.module.parameters():  # under ZeRO-3 an empty tensor
        assert max_over_ranks(parameter).equal(parameter), "ranks have different weights after the step"
    return (scalars["loss"], gradient), scalars


def on_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an engine gives on rank 0, on every rank."""
    from lodestar.distributed.collectives import from_main

    return from_main(tensors)


def steps(rank: int, size: int, folder: Path, jobs: list[tuple[str, ...]]) -> list[Outcome]:
    """Several steps in one process group; a job is (stage, *overrides)."""
    return [step(rank, size, stage, folder, *overrides) for stage, *overrides in jobs]


def plain_pretrain(folder: Path, *overrides: str) -> Outcome:
    """RetroMAE's loss on the whole batch at once, in fp64, with torch's own cross-entropy on whole logits."""
    run_recipe = recipe("pretrain", folder, *overrides, *WHOLE)
    task, _ = built_task(run_recipe, 0, 1)
    batch = next(task.batches(0))
    assert batch.num_micro_batches == 1
    masked, ids, words, lengths, keys, places, targets, _, _ = batch.inputs(0)
    model: Any = task.module.double().eval()
    position = torch.arange(ids.shape[1])
    attention = (position < lengths[:, None]).long()
    out = model.encoder(input_ids=masked, attention_mask=attention, output_hidden_states=True)
    first = F.cross_entropy(out.logits.flatten(0, 1)[places], targets)
    attention_mask_of_decoder = decoder_visibility(
        words, lengths, keys, run_recipe.mask.decoder, run_recipe.mask.decoder_sets
    )
    rebuilt = model._decode(out.hidden_states[-1][:, 0], ids, position, attention_mask_of_decoder)
    labels = ids.masked_fill((position == 0) | (position >= lengths[:, None] - 1), IGNORED)
    second = F.cross_entropy(model.encoder.cls(rebuilt).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    third = torch.zeros((), dtype=torch.float64)
    for logits, ids_L, words_L in zip(out.logits, ids, words, strict=True):
        largest = logits[words_L >= 0].amax(0).log_softmax(0)
        third = third - largest[ids_L[words_L >= 0].unique()].mean() / GLOBAL_SIZE
    return _backward(model, first + second + run_recipe.loss.bag_of_words * third)


def plain_finetune(folder: Path, *overrides: str) -> Outcome:
    """InfoNCE with the whole score matrix, in fp64."""
    run_recipe = recipe("finetune", folder, *overrides, *WHOLE)
    task, _ = built_task(run_recipe, 0, 1)
    batch = next(task.batches(0))
    model: Any = task.module.double().eval()
    mean = run_recipe.model.pooling == "mean"
    vectors = torch.cat([_embed(model, *batch.inputs(i)[:2], mean=mean) for i in range(batch.num_micro_batches)])
    q, d = vectors[batch.tensors["query_place_G"]], vectors[batch.tensors["passage_place_M"]]
    t = run_recipe.loss.temperature if model.log_temperature is None else model.log_temperature.exp()
    losses: list[Tensor] = []
    for width in (q.shape[1], *run_recipe.loss.matryoshka):
        short_q, short_d = (F.normalize(x[:, :width], dim=1) for x in (q, d))
        losses.append(_directions(short_q, short_d, batch.tensors["start_Q"], t, run_recipe.loss))
        if run_recipe.loss.distillation:
            losses[-1] += run_recipe.loss.distillation * _distillation(short_q, short_d, batch, t)
    loss = torch.stack(losses).mean()
    return _backward(model, loss)


def _directions(q: Tensor, d: Tensor, positive: Tensor, t: Any, loss: Any) -> Tensor:
    """All scores of each direction at once; no two texts of the fixture are equal."""
    p, index = d[positive], torch.arange(len(q))
    answer_score = (q * p).sum(1, keepdim=True) / t

    def against(anchor: Tensor, others: Tensor, own_index: Tensor) -> Tensor:
        negatives = (anchor @ others.T / t).scatter(1, own_index[:, None], -torch.inf)
        return F.cross_entropy(torch.cat([answer_score, negatives], 1), torch.zeros_like(own_index))

    return (
        F.cross_entropy(q @ d.T / t, positive)
        + loss.passage_to_query * against(p, q, index)
        + loss.query_to_query * against(q, q, index)
        + loss.passage_to_passage * against(p, d, positive)
    )


def _distillation(q: Tensor, d: Tensor, batch: Any, t: Any) -> Tensor:
    """KL divergence of each row; the gradient is that of FlagEmbedding's cross-entropy with the teacher."""
    teacher, scores = batch.tensors["teacher_QK"], q @ d.T / t
    student = torch.stack(
        [scores[i, start : start + teacher.shape[1]] for i, start in enumerate(batch.tensors["start_Q"].tolist())]
    )
    return F.kl_div(student.log_softmax(1), teacher.double().softmax(1), reduction="batchmean")


def _embed(model: Any, ids: Tensor, lengths: Tensor, *, mean: bool) -> Tensor:
    attention = torch.arange(ids.shape[1]) < lengths[:, None]
    hidden = model.encoder(input_ids=ids, attention_mask=attention.long()).last_hidden_state
    if not mean:
        return F.normalize(hidden[:, 0], dim=1)
    return torch.stack([F.normalize(x[:n].mean(0), dim=0) for x, n in zip(hidden, lengths.tolist(), strict=True)])


def _backward(model: Any, loss: Tensor) -> Outcome:
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(actual: Outcome, expected: Outcome) -> float:
    """The larger of the relative errors of the loss and of the gradient as one vector."""
    loss, gradient = actual
    assert gradient.keys() == expected[1].keys()
    actual_flat, expected_flat = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (gradient, expected[1]))
    return max(
        abs(loss - expected[0]) / abs(expected[0]), float((actual_flat - expected_flat).norm() / expected_flat.norm())
    )


def expected_examples(size: int) -> list[int]:
    return BatchPlan(GLOBAL_SIZE, size, 4).examples_per_rank
