"""What a fine-tuning run would do: `--plan`. Loads without torch."""

from __future__ import annotations

from typing import Any

from contrastive.config import TILE_BYTES, FinetuneRecipe
from lodestar.planning.cost_model import DEVICES, activation_bytes, memory, model_flops, seconds
from lodestar.planning.plan import PlanWarnings, describe, encoder_shape, rows_and_steps


def plan(recipe: FinetuneRecipe, world_size: int, device: str | None) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = PlanWarnings([])
    data, batch = recipe.data, recipe.batch
    rows, steps = rows_and_steps([each.path for each in data.sets], recipe.schedule, batch.global_size, missing)
    share = batch.plan(world_size)
    largest = max(share.rows_per_rank)
    passages_per_query = 1 + data.negatives_per_query
    seen = batch.global_size if recipe.loss.share_negatives else largest
    shape = encoder_shape(recipe.model, missing)
    query, passage = (data.length(role, recipe.model.max_length) for role in ("query", "passage"))
    row_tokens = query + passages_per_query * passage
    texts = largest * (1 + passages_per_query) + 2 * batch.global_size * passages_per_query
    chunk_tokens = -(-largest // share.num_micro_batches) * (1 + passages_per_query) * max(query, passage)
    per_token = activation_bytes(shape, recipe.precision, checkpointing=recipe.model.activation_checkpointing)
    graphs = max(1, int(batch.keep_graph))
    if 0 < batch.keep_graph < 1 and device:
        graphs = max(1, int(batch.keep_graph * DEVICES[device].memory_bytes / (chunk_tokens * per_token)))
    elif 0 < batch.keep_graph < 1:
        missing.lines.append("batch.keep_graph: a share of a device's memory: planned with one graph (name --device)")
    return describe(
        run=recipe.run,
        batch=batch,
        schedule=recipe.schedule,
        world_size=world_size,
        rows=rows,
        steps=steps,
        negatives_per_query=seen * passages_per_query - 1,
        tokens_at_most=None if steps is None else steps * batch.global_size * row_tokens,
        missing=missing,
        device=device,
        checkpoint_bytes=12 * shape.parameters,
        memory=memory(
            shape,
            engine=recipe.engine,
            world_size=world_size,
            precision=recipe.precision,
            tokens_at_once=min(graphs, share.num_micro_batches) * chunk_tokens,
            checkpointing=recipe.model.activation_checkpointing,
            embeddings=4 * shape.width * texts,
            tile=min(TILE_BYTES, 4 * largest * seen * passages_per_query),
        ),
        seconds=lambda on: seconds(
            shape,
            on,
            world_size=world_size,
            precision=recipe.precision,
            # a chunk that is computed twice costs a third more
            flops=model_flops(shape, largest * row_tokens, passage, passes=3 if share.num_micro_batches == 1 else 4),
            gathered=seen * passages_per_query if recipe.loss.share_negatives else 0,
            scored=largest * seen * passages_per_query,
        ),
    )
