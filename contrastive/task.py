"""From a fine-tuning recipe to what a run needs: batches, model, stage, evaluation and export."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase

from contrastive.collate import Collate, SampledDataset, StepBatch, TrainingDataset
from contrastive.config import DataConfig, FinetuneRecipe
from contrastive.model import BiEncoder
from contrastive.plan import plan
from contrastive.stage import FinetuneStage
from contrastive.stream import StreamedDataset
from contrastive.tokenization import FEATURES, Tokenize, settings
from lodestar.config.schema import Pooling
from lodestar.data.loader import step_batches
from lodestar.data.readers import Row, Source, find_sources
from lodestar.data.sampler import DatasetMixture, MakeSampler, ShuffledSampler
from lodestar.data.stream_windows import StreamSampler
from lodestar.data.token_cache import TokenizedDataset, check_repeated, print_findings, tokenized
from lodestar.data.training_examples import check_row
from lodestar.distributed.collectives import agreed, once_per_node, require_same
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.models.folder_checks import find_folder
from lodestar.models.hidden_states import prepare
from lodestar.models.load import folder_prompts, load_encoder, load_tokenizer
from lodestar.models.pooling_config import resolve_pooling
from lodestar.training.crash_loop import places
from lodestar.training.export import encoder_export
from lodestar.training.streams import Streams
from lodestar.training.synthetic import generated_text
from lodestar.training.task import TaskSpec, TrainingTask
from retrieval.embedding.known_models import resolve_prompts
from retrieval.evaluation.in_training import in_training_evaluation


def build_task(recipe: FinetuneRecipe, runtime: Runtime, make_sampler: MakeSampler = ShuffledSampler) -> TrainingTask:
    with agreed():  # an error on one node must not leave the other nodes waiting
        recipe = _with_instructions(recipe, runtime)
        pooling, reason, warnings = resolve_pooling(recipe.model, find_folder(recipe.model.encoder))
        if runtime.is_main:
            print(f"model.pooling: {pooling}, {reason}", *warnings, sep="\n", file=sys.stderr)
        tokenizer = load_tokenizer(recipe.model, pooling)
        if tokenizer.pad_token_id is None:
            raise ConfigError("model.tokenizer: has no padding token (add one)")
    data, seed, size = recipe.data, recipe.run.seed, recipe.batch.global_size
    max_lengths = {role: data.length(role, recipe.model.max_length) for role in ("query", "passage")}
    training = _training_data(recipe, runtime, tokenizer, max_lengths, make_sampler)
    require_same({"data.train": training.identity}, "data")
    collate, total_steps = training.collate, training.total_steps
    module = _model(recipe, runtime, pooling)
    prompts = {"query": data.query_instruction or "", "document": data.passage_instruction or ""}

    def embed(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        return module(ids_BL, lengths_B)[0]

    return TrainingTask(
        module=module,
        stage=FinetuneStage(
            loss=recipe.loss,
            global_size=size,
            seed=seed,
            device=runtime.device,
            max_length=max(max_lengths.values()),
            keep_graph=recipe.batch.keep_graph,
            memory_bytes=runtime.memory_bytes(),
        ),
        total_steps=total_steps,
        rows=training.rows,
        batches=training.batches,
        first_batch=None if data.streaming else lambda plan: replace(collate, plan=plan, rank=0)(0),
        held_micro_batches=max(1, int(recipe.batch.keep_graph)),
        counters={"masked": "masked_false_negatives"},
        identity={
            "stage": "finetune",
            "seed": seed,
            "global_size": size,
            "data": training.identity,
            **({"samples": list(training.samples)} if training.samples else {}),
            "pooling": pooling,
            "data.train.weight": [dataset.weight for dataset in data.sets],
            "data.train.in_batch_negatives": [dataset.in_batch_negatives for dataset in data.sets],
        },
        export=encoder_export(
            module.encoder,
            tokenizer,
            recipe,
            title="A text-embedding model for retrieval",
            prompts=prompts,
            pooling=pooling,
        ),
        evaluate=in_training_evaluation(recipe, tokenizer, runtime, embed, prompts=prompts),
        data_counts=training.counts,
        examples_at=training.examples_at,
        keep_best=recipe.evaluate.keep_best,
    )


class _TrainingData(NamedTuple):
    """What depends on whether examples are cached or streamed."""

    identity: Sequence[object]
    """Of each data set, equal for equal examples; ready for JSON."""
    total_steps: int
    collate: Collate
    batches: Callable[[int], Generator[StepBatch]]
    counts: Mapping[str, int]
    examples_at: Callable[[int], Sequence[str]]
    rows: int | None = None
    samples: Sequence[Sequence[str | None]] = ()
    """Of streams: hashes of parts of each file."""


def _training_data(
    recipe: FinetuneRecipe,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    max_lengths: Mapping[str, int],
    make_sampler: MakeSampler,
) -> _TrainingData:
    data = recipe.data
    instructions = data.query_instruction or "", data.passage_instruction or ""
    tokenize = Tokenize(tokenizer, *instructions, max_lengths["query"], max_lengths["passage"])
    with agreed():
        tokenize.check_lengths()
        sources = [find_sources([dataset.path]) for dataset in data.sets]
        check_repeated([*chain(*sources)], strict=data.strict, tell=runtime.is_main)
    pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
    if data.streaming:
        return _streamed_data(recipe, runtime, tokenize, pad_id, sources)
    return _cached_data(recipe, runtime, tokenize, pad_id, sources, make_sampler)


def _streamed_data(
    recipe: FinetuneRecipe, runtime: Runtime, tokenize: Tokenize, pad_id: int, sources: Sequence[Sequence[Source]]
) -> _TrainingData:
    data, size, total_steps = recipe.data, recipe.batch.global_size, recipe.schedule.steps or 0
    streams = Streams(
        recipe,
        data,
        runtime,
        sources,
        check=check_row,
        tokenize=tokenize,
        features=FEATURES,
        settings=settings(tokenize),
    )
    datasets = [
        StreamedDataset(windows, StreamSampler(size, recipe.run.seed, str(i)), dataset.in_batch_negatives)
        for i, (windows, dataset) in enumerate(zip(streams.windows, data.sets, strict=True))
    ]
    collate = _collate(recipe, runtime, pad_id, datasets, [dataset.weight for dataset in data.sets], total_steps)
    return _TrainingData(
        streams.sizes,
        total_steps,
        collate,
        batches=lambda start: streams.batches(collate, start, collate.mixture.at),
        counts=streams.counts,
        examples_at=lambda step: streams.examples_at(*collate.mixture.at(step)),
        samples=streams.samples,
    )


def _cached_data(
    recipe: FinetuneRecipe,
    runtime: Runtime,
    tokenize: Tokenize,
    pad_id: int,
    sources: Sequence[Sequence[Source]],
    make_sampler: MakeSampler,
) -> _TrainingData:
    data, seed, size = recipe.data, recipe.run.seed, recipe.batch.global_size

    def tokenized_dataset(sources_of_set: Sequence[Source]) -> TokenizedDataset:
        return tokenized(
            sources_of_set,
            cache_dir=Path(data.cache_dir),
            settings=settings(tokenize),
            tokenize=tokenize,
            check=check_row,
            features=FEATURES,
            processes=data.processes,
            strict=data.strict,
            first_on_node=runtime.local_rank == 0,
        )

    tokenized_datasets = once_per_node(lambda: [*map(tokenized_dataset, sources)], runtime.local_rank)
    stats, tables = [one.stats for one in tokenized_datasets], [one.rows for one in tokenized_datasets]
    if runtime.is_main:
        print_findings(stats)
    counts = Counter[str]()
    for one in stats:
        counts.update(one.counts())
    total_steps = recipe.schedule.total_steps(counts["rows"], size)
    datasets = [
        TrainingDataset(table, make_sampler(len(table), size, seed, str(i)), dataset.in_batch_negatives).with_columns()
        for i, (dataset, table) in enumerate(zip(data.sets, tables, strict=True))
    ]
    weights = [dataset.weight * len(table) for dataset, table in zip(data.sets, tables, strict=True)]
    collate = _collate(recipe, runtime, pad_id, datasets, weights, total_steps)
    return _TrainingData(
        [one.fingerprint for one in stats],
        total_steps,
        collate,
        batches=lambda start: step_batches(
            collate, start=start, total=total_steps, workers=data.workers, pin=runtime.device.type == "cuda"
        ),
        counts=dict(counts),
        examples_at=lambda step: _example_names(data, collate, step),
        rows=counts["rows"],
    )


def _collate(
    recipe: FinetuneRecipe,
    runtime: Runtime,
    pad_id: int,
    datasets: Sequence[SampledDataset],
    weights: Sequence[float],
    total_steps: int,
) -> Collate:
    return Collate(
        datasets=datasets,
        mixture=DatasetMixture(weights, total_steps, recipe.run.seed),
        plan=recipe.batch.plan(runtime.world_size),
        rank=runtime.rank,
        seed=recipe.run.seed,
        negatives=recipe.data.negatives_per_query,
        pad_id=pad_id,
        packed=recipe.model.attention == "packed",
    )


def _example_names(data: DataConfig, collate: Collate, step: int) -> list[str]:
    """FILE:LINE of each example of a step."""
    dataset, batch = collate.mixture.at(step)
    rows = collate.datasets[dataset].sampler.batch(batch, range(collate.plan.global_size))[1].tolist()
    found, _ = places(find_sources([data.sets[dataset].path]), check_row, set(rows))
    return [found.get(row, f"row {row}") for row in rows]


def _with_instructions(recipe: FinetuneRecipe, runtime: Runtime) -> FinetuneRecipe:
    """The recipe with the encoder's own instructions where it leaves them out."""
    encoder, data = recipe.model.encoder, recipe.data
    known = {**resolve_prompts(encoder, None), **{k: v for k, v in folder_prompts(encoder).items() if v}}
    for key, role in (("query_instruction", "query"), ("passage_instruction", "document")):
        if getattr(data, key) is None:
            instruction = known.get(role, "")
            data = data.model_copy(update={key: instruction})
            if instruction and runtime.is_main:
                print(f"data.{key}: {instruction!r}, as {encoder} takes it", file=sys.stderr)
    return recipe.model_copy(update={"data": data})


def _model(recipe: FinetuneRecipe, runtime: Runtime, pooling: Pooling) -> BiEncoder:
    loaded = load_encoder(recipe.model, AutoModel, seed=recipe.run.seed, pooling=pooling)
    if runtime.is_main:
        print(loaded, file=sys.stderr)
    prepare(loaded.model, recipe.model, runtime.device, cls_only=pooling == "cls")
    full_width = loaded.model.config.hidden_size
    for width in recipe.loss.matryoshka:
        if width >= full_width:
            raise ConfigError(f"loss.matryoshka: {width}: not narrower than the embedding (it has {full_width})")
    loss = recipe.loss
    return BiEncoder(loaded.model, loss.temperature, learned=loss.learn_temperature, pooling=pooling)


def _synthetic_row(recipe: FinetuneRecipe, fraction: float, index: int) -> Row:
    data, num_passages = recipe.data, 1 + recipe.data.negatives_per_query
    query_tokens, passage_tokens = (
        int(fraction * data.length(role, recipe.model.max_length)) for role in ("query", "passage")
    )
    passages = [generated_text(passage_tokens, num_passages * index + i) for i in range(num_passages)]
    row = {"query": generated_text(query_tokens, -1 - index), "pos": passages[:1], "neg": passages[1:]}
    return {**row, "pos_scores": [1.0], "neg_scores": [0.0] * len(row["neg"])} if recipe.loss.distillation else row


def _with_training_file(recipe: FinetuneRecipe, file: Path, cache_dir: Path) -> FinetuneRecipe:
    data = recipe.data.model_copy(update={"train": [str(file)], "streaming": False, "cache_dir": str(cache_dir)})
    return recipe.model_copy(update={"data": data})


SPEC = TaskSpec(build_task, plan, _synthetic_row, _with_training_file)
