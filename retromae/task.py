"""From a pre-training recipe to what a run needs: batches, model, stage, evaluation and export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from lodestar.config.schema import BatchPlan
from lodestar.data.loader import step_batches
from lodestar.data.readers import Row, Source, find_sources
from lodestar.data.sampler import MakeSampler, ShuffledSampler
from lodestar.data.stream_windows import StreamSampler
from lodestar.data.token_cache import check_repeated, print_findings, tokenized
from lodestar.distributed.collectives import agreed, once_per_node, require_same
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.models.folder_checks import find_folder
from lodestar.models.hidden_states import prepare
from lodestar.models.load import load_encoder, load_tokenizer
from lodestar.models.pooling_config import resolve_pooling
from lodestar.training.crash_loop import places
from lodestar.training.export import encoder_export
from lodestar.training.streams import Streams
from lodestar.training.synthetic import generated_text
from lodestar.training.task import TaskSpec, TrainingTask
from retrieval.evaluation.in_training import in_training_evaluation
from retromae.collate import CachedTexts, Collate, StepBatch
from retromae.config import PretrainRecipe
from retromae.model import RetroMAE
from retromae.plan import plan
from retromae.stage import PretrainStage
from retromae.stream import StreamTexts
from retromae.text_check import TextCheck
from retromae.tokenization import FEATURES, Tokenize, settings


def build_task(recipe: PretrainRecipe, runtime: Runtime, make_sampler: MakeSampler = ShuffledSampler) -> TrainingTask:
    model, seed = recipe.model, recipe.run.seed
    with agreed():  # an error on one node must not leave the other nodes waiting
        pooling, _, warnings = resolve_pooling(model, find_folder(model.encoder))
        if runtime.is_main and warnings:
            print(*warnings, sep="\n", file=sys.stderr)
        tokenizer = load_tokenizer(model, pooling)
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ConfigError("model.tokenizer: has no mask or no padding token (RetroMAE needs both)")
        sources = find_sources(recipe.data.train)
        check_repeated(sources, strict=recipe.data.strict, tell=runtime.is_main)
        if recipe.data.streaming and recipe.schedule.steps is None:
            raise ConfigError("data.streaming: a stream has no known length (set schedule.steps instead of epochs)")
    if recipe.data.streaming:
        data = _streamed_data(recipe, runtime, tokenizer, sources)
    else:
        data = _cached_data(recipe, runtime, tokenizer, sources, make_sampler)
    require_same({"data.train": data.identity}, "data")
    loaded = load_encoder(model, AutoModelForMaskedLM, seed=seed, random_head=model.random_head)
    if runtime.is_main:
        print(loaded, file=sys.stderr)
    prepare(loaded.model, model, runtime.device)
    module = RetroMAE(
        loaded.model,
        mask=recipe.mask,
        decoder=recipe.decoder,
        max_length=model.max_length,
        bag_of_words=recipe.loss.bag_of_words > 0,
    )

    def embed(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        return F.normalize(module.cls(ids_BL, lengths_B).float(), dim=1)

    title = "RetroMAE pre-training: a starting point for fine-tuning, not yet a retrieval model"
    return TrainingTask(
        module=module,
        stage=PretrainStage(weights=recipe.loss.weights, seed=seed, device=runtime.device),
        total_steps=data.total_steps,
        rows=data.rows,
        batches=data.batches,
        first_batch=data.first_batch,
        identity={
            "stage": "pretrain",
            "seed": seed,
            "global_size": recipe.batch.global_size,
            "data": data.identity,
            **({"samples": list(data.samples)} if data.samples else {}),
        },
        export=encoder_export(module.encoder, tokenizer, recipe, title=title, prompts={}, pooling=pooling),
        evaluate=in_training_evaluation(recipe, tokenizer, runtime, embed, prompts={}),
        data_counts=data.counts,
        examples_at=data.examples_at,
        new_names=NEW_NAMES,
    )


class _TrainingData(NamedTuple):
    """The fields of TrainingTask that depend on whether texts are cached or streamed."""

    identity: object
    """Equal for equal texts; ready for JSON."""
    total_steps: int
    batches: Callable[[int], Generator[StepBatch]]
    first_batch: Callable[[BatchPlan], StepBatch] | None = None
    rows: int | None = None
    examples_at: Callable[[int], Sequence[str]] | None = None
    counts: Mapping[str, int] = {}
    samples: Sequence[str | None] = ()
    """Of a stream: hashes of parts of each file."""


def _streamed_data(
    recipe: PretrainRecipe, runtime: Runtime, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]
) -> _TrainingData:
    data, seed, size = recipe.data, recipe.run.seed, recipe.batch.global_size
    streams = Streams(
        recipe,
        data,
        runtime,
        [sources],
        check=TextCheck(data.field),
        tokenize=_tokenize(recipe, tokenizer),
        features=FEATURES,
        settings=settings(data, tokenizer, recipe.model.max_length),
    )
    plan, is_packed = recipe.batch.plan(runtime.world_size), recipe.model.attention == "packed"
    texts, sampler = StreamTexts(streams.windows[0]), StreamSampler(size, seed)
    collate = Collate(texts, sampler, plan, runtime.rank, seed, tokenizer, recipe.mask.encoder, is_packed)
    return _TrainingData(
        streams.sizes[0],
        recipe.schedule.steps or 0,
        batches=lambda start: streams.batches(collate, start, lambda step: (0, step)),
        counts=streams.counts,
        samples=streams.samples[0],
        examples_at=lambda step: streams.examples_at(0, step),
    )


def _cached_data(
    recipe: PretrainRecipe,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    make_sampler: MakeSampler,
) -> _TrainingData:
    data, seed, size = recipe.data, recipe.run.seed, recipe.batch.global_size
    dataset = once_per_node(
        lambda: tokenized(
            sources,
            cache_dir=Path(data.cache_dir),
            settings=settings(data, tokenizer, recipe.model.max_length),
            tokenize=_tokenize(recipe, tokenizer),
            check=TextCheck(data.field),
            features=FEATURES,
            processes=data.processes,
            version=Tokenize.version,
            strict=data.strict,
            first_on_node=runtime.local_rank == 0,
        ),
        runtime.local_rank,
    )
    if runtime.is_main:
        print_findings([dataset.stats])
    rows = len(dataset.rows)
    total_steps = recipe.schedule.total_steps(rows, size)
    plan = recipe.batch.plan(runtime.world_size)
    texts, sampler = CachedTexts(dataset.rows), make_sampler(rows, size, seed, "")
    is_packed = recipe.model.attention == "packed"
    collate = Collate(texts, sampler, plan, runtime.rank, seed, tokenizer, recipe.mask.encoder, is_packed)
    return _TrainingData(
        dataset.stats.fingerprint,
        total_steps,
        batches=lambda start: step_batches(
            collate, start=start, total=total_steps, workers=data.workers, pin=runtime.device.type == "cuda"
        ),
        first_batch=lambda plan: replace(collate, plan=plan, rank=0)(0),
        rows=rows,
        examples_at=lambda step: _example_names(
            sources, TextCheck(data.field), dataset.rows, sampler.batch(step, range(size))[1].tolist()
        ),
        counts=dataset.stats.counts(),
    )


def _example_names(
    sources: Sequence[Source], check: TextCheck, table: datasets.Dataset, rows: Sequence[int]
) -> list[str]:
    """FILE:LINE of the text of each row of the token cache; the number of the row where a text gave no row."""
    part: np.ndarray = table.data.column("part").to_numpy()
    text_of_row = (part == 0).cumsum() - 1
    found, count = places(sources, check, {int(text_of_row[row]) for row in rows})
    if count != text_of_row[-1] + 1:
        return [f"row {row} of the token cache" for row in rows]
    return [found[int(text_of_row[row])] for row in rows]


def _tokenize(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> Tokenize:
    return Tokenize(tokenizer, max_length=recipe.model.max_length, split=recipe.data.long_texts == "split")


NEW_NAMES = {
    "decoder.mix.": "decoder.out_proj.",
    "decoder.mix_norm.": "decoder.attention_norm.",
    "decoder.widen.": "decoder.fc1.",
    "decoder.narrow.": "decoder.fc2.",
    "decoder.narrow_norm.": "decoder.output_norm.",
}
"""Prefixes of the decoder's parameter names in checkpoints of version 0.1 -> prefixes today."""


def _synthetic_row(recipe: PretrainRecipe, fraction: float, index: int) -> Row:
    return {"text": generated_text(int(fraction * recipe.model.max_length), index)}


def _with_training_file(recipe: PretrainRecipe, file: Path, cache_dir: Path) -> PretrainRecipe:
    data = recipe.data.model_copy(
        update={
            "train": [str(file)], "field": "text", "long_texts": "cut", "streaming": False, "cache_dir": str(cache_dir)
        }
    )  # fmt: skip
    return recipe.model_copy(update={"data": data})


SPEC = TaskSpec(build_task, plan, _synthetic_row, _with_training_file)
