"""From a pre-training recipe to what a run needs: rows, model, stage, evaluator and export."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from lodestar.data.readers import find_sources, stream_rows
from lodestar.data.sampler import ShuffledSampler
from lodestar.data.token_cache import tokenized
from lodestar.distributed.collectives import agreed, once_per_node, require_same
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.models.load import load_encoder, load_tokenizer
from lodestar.models.save import model_card, save_model
from lodestar.training.engine import Engine, autocast
from lodestar.training.synthetic import generated_text
from lodestar.training.task import TrainingTask
from retrieval.evaluation.in_training import InTrainingEvaluator
from retromae.collate import Collate, FromCorpus, StepBatch
from retromae.config import PretrainRecipe
from retromae.model import RetroMAE
from retromae.stage import PretrainStage
from retromae.stream import FromStream, InOrder
from retromae.tokenization import FEATURES, ROW_FEATURES, Tokenize, check, settings


def build_task(recipe: PretrainRecipe, runtime: Runtime) -> TrainingTask:
    model, data, seed = recipe.model, recipe.data, recipe.run.seed
    with agreed():  # what is wrong on one node must not leave the others waiting
        tokenizer = load_tokenizer(model)
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ConfigError("model.tokenizer: has no mask or no padding token (RetroMAE needs both)")
        sources = find_sources(data.train)
        if data.streaming and recipe.schedule.steps is None:
            raise ConfigError("data.streaming: a stream has no known length (set schedule.steps instead of epochs)")
    tokenize = Tokenize(tokenizer, max_length=model.max_length, split=data.long_texts == "split")
    plan = recipe.batch.plan(runtime.world_size)

    def collate_over(rows: Any, order: Any) -> Collate:
        return Collate(rows, order, plan, runtime.rank, seed, tokenizer, recipe.mask.encoder)

    if data.streaming:
        rows, total, facts = None, recipe.schedule.steps or 0, {}
        identity = {"data": [each.size_bytes for each in sources]}  # to read it all for a hash would take too long
        collate = None

        def stream(start: int) -> Generator[StepBatch]:
            size = recipe.batch.global_size
            texts = FromStream(lambda: stream_rows(sources), check(data.field), tokenize, size, seed)
            return texts.batches(collate_over(texts, InOrder(size)), start, recipe.schedule.steps or 0)
    else:
        stream = None  # type: ignore[assignment]
        corpus = once_per_node(
            lambda: tokenized(
                sources,
                cache_dir=Path(data.cache_dir),
                settings=settings(data, tokenizer, model.max_length),
                tokenize=tokenize,
                check=check(data.field),
                row_features=ROW_FEATURES,
                features=FEATURES,
                processes=data.processes,
                first_on_node=runtime.local_rank == 0,
            ),
            runtime.local_rank,
        )
        rows = len(corpus.rows)
        total = recipe.schedule.total_steps(rows, recipe.batch.global_size)
        facts = {
            "rows": rows,
            "tokens": corpus.facts.tokens,
            "truncated": corpus.facts.truncated,
            "dropped": corpus.facts.dropped,
        }
        identity = {"data": corpus.facts.fingerprint}
        collate = collate_over(FromCorpus(corpus.rows), ShuffledSampler(rows, recipe.batch.global_size, seed))

    require_same({"data.train": identity["data"]}, "data")
    loaded = load_encoder(model, AutoModelForMaskedLM, seed=seed, random_head=model.random_head)
    if runtime.is_main:
        print(loaded, file=sys.stderr)
    module = RetroMAE(
        loaded.model,
        mask=recipe.mask,
        decoder=recipe.decoder,
        max_length=model.max_length,
        bag_of_words=recipe.loss.bag_of_words > 0,
    )
    return TrainingTask(
        module=module,
        stage=PretrainStage(bag_of_words=recipe.loss.bag_of_words, seed=seed, rank=runtime.rank, device=runtime.device),
        total_steps=total,
        rows=rows,
        collate=collate,
        stream=stream,
        workers=data.workers,
        identity={"stage": "pretrain", "seed": seed, "global_size": recipe.batch.global_size, **identity},
        export=_export(recipe, module, tokenizer),
        evaluate=_evaluation(recipe, module, tokenizer, runtime) if recipe.evaluate.data else None,
        facts=facts,
        new_names=NEW_NAMES,
    )


NEW_NAMES = {
    "decoder.mix.": "decoder.out_proj.",
    "decoder.mix_norm.": "decoder.attention_norm.",
    "decoder.widen.": "decoder.fc1.",
    "decoder.narrow.": "decoder.fc2.",
    "decoder.narrow_norm.": "decoder.output_norm.",
}
"""Of the decoder's parameters, for checkpoints of version 0.1."""


def generate(recipe: PretrainRecipe, share: float, number: int) -> dict[str, Any]:
    """A row whose text has `share` of the largest length."""
    return {"text": generated_text(int(share * recipe.model.max_length), number)}


def _evaluation(recipe: PretrainRecipe, module: RetroMAE, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> Any:
    """Retrieval of held-out pairs by the [CLS] vector, so that one can see when to stop."""
    length = recipe.model.max_length
    evaluator = InTrainingEvaluator(
        recipe.evaluate, tokenizer, runtime, max_lengths={"query": length, "document": length}, prompts={}
    )

    def embed(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        with autocast(runtime.device, recipe.precision):
            return F.normalize(module.cls(ids_BL, lengths_B).float(), dim=1)

    def evaluate(engine: Engine) -> dict[str, Any]:
        return {"evaluation": evaluator.name, **evaluator.measure(embed)}

    return evaluate


def _export(recipe: PretrainRecipe, module: RetroMAE, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The plain encoder with its language-model head; the decoder stays in the checkpoints."""

    def export(weights: Mapping[str, Tensor], folder: Path, facts: Mapping[str, Any]) -> None:
        prefix = "encoder."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        title = "RetroMAE pre-training: a starting point for fine-tuning, not yet a retrieval model"
        save_model(
            module.encoder,
            tokenizer,
            folder,
            weights=own,
            max_length=recipe.model.max_length,
            prompts={},
            card=model_card(title, recipe, facts),
        )

    return export
