"""From a fine-tuning recipe to what a run needs: batches, model, stage, evaluation and export."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase

from contrastive.collate import Collate, TrainingDataset
from contrastive.config import FinetuneRecipe
from contrastive.model import BiEncoder
from contrastive.plan import plan
from contrastive.stage import FinetuneStage
from contrastive.tokenization import FEATURES, Tokenize, settings
from lodestar.data.loader import step_batches
from lodestar.data.readers import find_sources
from lodestar.data.sampler import DatasetMixture, MakeSampler, ShuffledSampler
from lodestar.data.token_cache import TokenizedDataset, tokenized
from lodestar.data.training_examples import ROW_FEATURES, check_row
from lodestar.distributed.collectives import agreed, once_per_node, require_same
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.models.load import load_encoder, load_tokenizer
from lodestar.models.save import model_card, save_model
from lodestar.training.engine import autocast
from lodestar.training.synthetic import generated_text
from lodestar.training.task import Evaluate, Export, Row, TaskSpec, TrainingTask
from retrieval.evaluation.in_training import InTrainingEvaluator


def build_task(recipe: FinetuneRecipe, runtime: Runtime, sampler: MakeSampler = ShuffledSampler) -> TrainingTask:
    model, data, seed, size = recipe.model, recipe.data, recipe.run.seed, recipe.batch.global_size
    with agreed():  # what is wrong on one node must not leave the others waiting
        tokenizer = load_tokenizer(model)
        if tokenizer.pad_token_id is None:
            raise ConfigError("model.tokenizer: has no padding token (add one)")
    lengths = {role: data.length(role, model.max_length) for role in ("query", "passage")}
    tokenize = Tokenize(
        tokenizer, data.query_instruction, data.passage_instruction, lengths["query"], lengths["passage"]
    )
    corpora = once_per_node(
        lambda: [_corpus(recipe, dataset.path, tokenize, runtime.local_rank == 0) for dataset in data.sets],
        runtime.local_rank,
    )
    fingerprints = [corpus.stats.fingerprint for corpus in corpora]
    require_same({"data.train": fingerprints}, "data")
    counts = Counter[str]()
    for corpus in corpora:
        counts.update(corpus.stats.counts())
    total_steps = recipe.schedule.total_steps(counts["rows"], size)
    weights = [dataset.weight * len(corpus.rows) for dataset, corpus in zip(data.sets, corpora, strict=True)]
    collate = Collate(
        sets=[
            TrainingDataset(corpus.rows, sampler(len(corpus.rows), size, seed, str(i)), dataset.in_batch_negatives)
            for i, (dataset, corpus) in enumerate(zip(data.sets, corpora, strict=True))
        ],
        mixture=DatasetMixture(weights, total_steps, seed),
        plan=recipe.batch.plan(runtime.world_size),
        rank=runtime.rank,
        seed=seed,
        negatives=data.negatives_per_query,
        pad_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
    )
    module = _model(recipe, runtime)
    return TrainingTask(
        module=module,
        stage=FinetuneStage(
            loss=recipe.loss,
            global_size=size,
            seed=seed,
            device=runtime.device,
            max_length=max(lengths.values()),
            keep_graph=recipe.batch.keep_graph,
            memory_bytes=runtime.memory_bytes(),
        ),
        total_steps=total_steps,
        rows=counts["rows"],
        batches=lambda start: step_batches(
            collate, start=start, total=total_steps, workers=data.workers, pin=runtime.device.type == "cuda"
        ),
        micro_batches=lambda plan: replace(collate, plan=plan, rank=0)(0).micro_batches,
        held_micro_batches=max(1, int(recipe.batch.keep_graph)),
        identity={
            "stage": "finetune",
            "seed": seed,
            "global_size": size,
            "data": fingerprints,
            "data.train.weight": [dataset.weight for dataset in data.sets],
            "data.train.in_batch_negatives": [dataset.in_batch_negatives for dataset in data.sets],
        },
        export=_export(recipe, module, tokenizer),
        evaluate=_evaluation(recipe, module, tokenizer, runtime) if recipe.evaluate.data else None,
        facts=dict(counts),
        keep_best=recipe.evaluate.keep_best,
    )


def _model(recipe: FinetuneRecipe, runtime: Runtime) -> BiEncoder:
    loaded = load_encoder(recipe.model, AutoModel, seed=recipe.run.seed)
    if runtime.is_main:
        print(loaded, file=sys.stderr)
    width = loaded.model.config.hidden_size
    for narrower in recipe.loss.matryoshka:
        if narrower >= width:
            raise ConfigError(f"loss.matryoshka: {narrower}: not narrower than the embedding (it has {width})")
    return BiEncoder(loaded.model, recipe.loss.temperature, learned=recipe.loss.learn_temperature)


def _synthetic_row(recipe: FinetuneRecipe, fraction: float, number: int) -> Row:
    data, longest = recipe.data, recipe.model.max_length
    query, passage = (int(fraction * data.length(role, longest)) for role in ("query", "passage"))
    passages = 1 + data.negatives_per_query
    texts = [generated_text(passage, passages * number + i) for i in range(passages)]
    row = {"query": generated_text(query, -1 - number), "pos": texts[:1], "neg": texts[1:]}
    return {**row, "pos_scores": [1.0], "neg_scores": [0.0] * len(texts[1:])} if recipe.loss.distillation else row


def _with_training_file(recipe: FinetuneRecipe, file: Path, cache_dir: Path) -> FinetuneRecipe:
    data = recipe.data.model_copy(update={"train": [str(file)], "cache_dir": str(cache_dir)})
    return recipe.model_copy(update={"data": data})


SPEC = TaskSpec(build_task, plan, _synthetic_row, _with_training_file)


def _corpus(recipe: FinetuneRecipe, path: str, tokenize: Tokenize, first_on_node: bool) -> TokenizedDataset:
    return tokenized(
        find_sources([path]),
        cache_dir=Path(recipe.data.cache_dir),
        settings=settings(recipe.data, tokenize),
        tokenize=tokenize,
        check=check_row,
        row_features=ROW_FEATURES,
        features=FEATURES,
        processes=recipe.data.processes,
        first_on_node=first_on_node,
    )


def _evaluation(
    recipe: FinetuneRecipe, module: BiEncoder, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> Evaluate:
    data, longest = recipe.data, recipe.model.max_length
    evaluator = InTrainingEvaluator(
        recipe.evaluate,
        tokenizer,
        runtime,
        max_lengths={"query": longest, "document": longest},
        prompts={"query": data.query_instruction, "document": data.passage_instruction},
    )

    def embed(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        with autocast(runtime.device, recipe.precision):
            return module(ids_BL, lengths_B)[0]

    return lambda: {"evaluation": evaluator.name, **evaluator.measure(embed)}


def _export(recipe: FinetuneRecipe, module: BiEncoder, tokenizer: PreTrainedTokenizerBase) -> Export:
    def export(weights: Mapping[str, Tensor], folder: Path, facts: Mapping[str, Any]) -> None:
        save_model(
            module.encoder,
            tokenizer,
            folder,
            weights={n.removeprefix("encoder."): w for n, w in weights.items() if n.startswith("encoder.")},
            max_length=recipe.model.max_length,
            prompts={"query": recipe.data.query_instruction, "document": recipe.data.passage_instruction},
            card=model_card("A text-embedding model for retrieval", recipe, facts),
        )

    return export
