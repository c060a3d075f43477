"""What a fine-tuning run would do: `--plan`. Loads without torch."""

from __future__ import annotations

from contextlib import suppress

from contrastive.config import TILE_BYTES, FinetuneRecipe
from lodestar.errors import ModelError
from lodestar.models.folder_checks import check_model
from lodestar.models.pooling_config import pooling_on_disk
from lodestar.planning.cost_model import DEVICES, EncoderShape, StepCost, activation_bytes, model_flops
from lodestar.planning.encoder import check_encoder, encoder_shape
from lodestar.planning.plan import Plan, PlanWarnings, describe
from retrieval.evaluation.beir import check_beir


def check(recipe: FinetuneRecipe) -> None:
    """Raises for what cannot work, as far as the recipe and small files say it: before torch is loaded."""
    _check_model(recipe)
    if recipe.evaluate.data:
        check_beir(recipe.evaluate.data, recipe.evaluate.split)
    check_model(recipe.model)
    pooling_on_disk(recipe.model)


def _check_model(recipe: FinetuneRecipe) -> None:
    data = recipe.data
    lengths = {
        "model.max_length": recipe.model.max_length,
        "data.query_max_length": data.query_max_length,
        "data.passage_max_length": data.passage_max_length,
    }
    check_encoder(recipe.model, lengths=lengths, widths=recipe.loss.matryoshka)


def plan(recipe: FinetuneRecipe, world_size: int, device: str | None) -> Plan:
    """The plan of a fine-tuning run, as `--plan` prints it."""
    with suppress(ModelError):  # a damaged folder is a warning, below
        _check_model(recipe)
    warnings = PlanWarnings()
    if recipe.evaluate.data:
        section = recipe.evaluate
        warnings.or_default(None, lambda: check_beir(section.data or "", section.split), "it cannot be measured")
    data, batch = recipe.data, recipe.batch.plan(world_size)
    queries, passages_per_query = max(batch.examples_per_rank), 1 + data.negatives_per_query
    share_negatives = recipe.loss.share_negatives
    candidates = (batch.global_size if share_negatives else queries) * passages_per_query
    shape = encoder_shape(recipe.model, warnings)
    query_length, passage_length = (data.length(role, recipe.model.max_length) for role in ("query", "passage"))
    tokens_per_example = query_length + passages_per_query * passage_length
    # Of this rank's texts; of all, and those that the loss reads; the last two with their gradients.
    embeddings = queries * (1 + passages_per_query) + 2 * (batch.global_size * (1 + passages_per_query) + candidates)
    count = batch.num_micro_batches(tokens_per_example)
    micro_tokens = -(-queries // count) * (1 + passages_per_query) * max(query_length, passage_length)
    if batch.micro_tokens is not None:
        micro_tokens = min(micro_tokens, max(batch.micro_tokens, query_length, passage_length))
    # A single micro-batch takes a single pass.
    num_graphs = min(_num_graphs(recipe, shape, micro_tokens, device, warnings), count) if count > 1 else 1
    return describe(
        recipe,
        world_size,
        device,
        train=[dataset.path for dataset in data.sets],
        cache_dir=data.cache_dir,
        cost=StepCost(
            shape,
            held_tokens=max(1, num_graphs) * micro_tokens,
            flops=model_flops(
                shape,
                queries * tokens_per_example,
                passage_length,
                forwards=3 + (count - num_graphs) / count,  # GradCache embeds the others twice
            ),
            embedding_bytes=4 * shape.width * embeddings,
            loss_bytes=min(TILE_BYTES, 4 * queries * candidates),
            gathered_embeddings=batch.global_size * (1 + passages_per_query),
            scored_pairs=queries * candidates,
        ),
        tokens_per_example=tokens_per_example,
        negatives_per_query=candidates - 1,
        warnings=warnings,
    )


def _num_graphs(
    recipe: FinetuneRecipe, shape: EncoderShape, micro_tokens: int, device: str | None, warnings: PlanWarnings
) -> int:
    """Micro-batches whose graphs are kept."""
    keep_graph = recipe.batch.keep_graph
    if not 0 < keep_graph < 1:
        return int(keep_graph)
    if device is None:
        warnings.lines.append(
            "batch.keep_graph: a fraction of the device's memory; planned with one graph (name --device)"
        )
        return 1
    checkpointing = recipe.model.activation_checkpointing
    graph_bytes = micro_tokens * activation_bytes(shape, recipe.precision, checkpointing=checkpointing)
    return int(keep_graph * DEVICES[device].memory_bytes / graph_bytes)
