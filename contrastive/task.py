"""From a fine-tuning recipe to what a run needs: rows, model, stage, evaluation and export."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase

from contrastive.collate import Collate, DataSet
from contrastive.config import FinetuneRecipe
from contrastive.model import BiEncoder
from contrastive.stage import FinetuneStage
from contrastive.tokenization import FEATURES, Tokenize, settings
from lodestar.data.readers import find_sources
from lodestar.data.sampler import DatasetMixture, ShuffledSampler
from lodestar.data.token_cache import TokenizedDataset, tokenized
from lodestar.data.training_examples import ROW_FEATURES, check_row
from lodestar.distributed.collectives import agreed, once_per_node, require_same
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.models.load import load_encoder, load_tokenizer
from lodestar.models.save import model_card, save_model
from lodestar.training.engine import Engine, autocast
from lodestar.training.synthetic import generated_text
from lodestar.training.task import TrainingTask
from retrieval.evaluation.in_training import InTrainingEvaluator


def build_task(recipe: FinetuneRecipe, runtime: Runtime) -> TrainingTask:
    model, data, seed, size = recipe.model, recipe.data, recipe.run.seed, recipe.batch.global_size
    with agreed():  # what is wrong on one node must not leave the others waiting
        tokenizer = load_tokenizer(model)
        if tokenizer.pad_token_id is None:
            raise ConfigError("model.tokenizer: has no padding token (add one)")
    query_length, passage_length = (data.length(role, model.max_length) for role in ("query", "passage"))
    tokenize = Tokenize(tokenizer, data.query_instruction, data.passage_instruction, query_length, passage_length)
    first = runtime.local_rank == 0
    corpora = once_per_node(
        lambda: [_corpus(recipe, each.path, tokenize, first) for each in data.sets], runtime.local_rank
    )
    fingerprints = [corpus.facts.fingerprint for corpus in corpora]
    require_same({"data.train": fingerprints}, "data")
    rows = sum(len(corpus.rows) for corpus in corpora)
    total = recipe.schedule.total_steps(rows, size)
    sets = [
        DataSet(corpus.rows, ShuffledSampler(len(corpus.rows), size, seed, str(i)), each.in_batch_negatives)
        for i, (each, corpus) in enumerate(zip(data.sets, corpora, strict=True))
    ]
    shares = [each.weight * len(corpus.rows) for each, corpus in zip(data.sets, corpora, strict=True)]
    plan = recipe.batch.plan(runtime.world_size)
    loaded = load_encoder(model, AutoModel, seed=seed)
    if runtime.is_main:
        print(loaded, file=sys.stderr)
    width = loaded.model.config.hidden_size
    for narrower in recipe.loss.matryoshka:
        if narrower >= width:
            raise ConfigError(f"loss.matryoshka: {narrower}: not narrower than the embedding (it has {width})")
    module = BiEncoder(loaded.model, recipe.loss.temperature, learned=recipe.loss.learn_temperature)
    return TrainingTask(
        module=module,
        stage=FinetuneStage(
            loss=recipe.loss,
            global_size=size,
            seed=seed,
            device=runtime.device,
            max_length=max(query_length, passage_length),
            keep_graph=recipe.batch.keep_graph,
            memory_bytes=runtime.memory_bytes(),
        ),
        total_steps=total,
        rows=rows,
        collate=Collate(
            sets,
            DatasetMixture(shares, total, seed),
            plan,
            runtime.rank,
            seed,
            data.negatives_per_query,
            tokenizer.pad_token_id,  # type: ignore[arg-type]
        ),
        workers=data.workers,
        identity={
            "stage": "finetune",
            "seed": seed,
            "global_size": size,
            "data": fingerprints,
            "data.train.weight": [each.weight for each in data.sets],
            "data.train.in_batch_negatives": [each.in_batch_negatives for each in data.sets],
        },
        export=_export(recipe, module, tokenizer),
        evaluate=_evaluation(recipe, module, tokenizer, runtime) if recipe.evaluate.data else None,
        facts={
            name: sum(getattr(c.facts, name) for c in corpora) for name in ("rows", "tokens", "truncated", "dropped")
        },
        keep_best=recipe.evaluate.keep_best,
    )


def generate(recipe: FinetuneRecipe, share: float, number: int) -> dict[str, Any]:
    """A row whose texts have `share` of the largest lengths."""
    data, most = recipe.data, recipe.model.max_length
    query, passage = (int(share * data.length(role, most)) for role in ("query", "passage"))
    passages = 1 + data.negatives_per_query
    texts = [generated_text(passage, passages * number + i) for i in range(passages)]
    row = {"query": generated_text(query, -1 - number), "pos": texts[:1], "neg": texts[1:]}
    return {**row, "pos_scores": [1.0], "neg_scores": [0.0] * len(texts[1:])} if recipe.loss.distillation else row


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


def _evaluation(recipe: FinetuneRecipe, module: BiEncoder, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> Any:
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

    def evaluate(engine: Engine) -> dict[str, Any]:
        return {"evaluation": evaluator.name, **evaluator.measure(embed)}

    return evaluate


def _export(recipe: FinetuneRecipe, module: BiEncoder, tokenizer: PreTrainedTokenizerBase) -> Any:
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
