"""What a pre-training run would do: `--plan`. Loads without torch."""

from __future__ import annotations

from typing import Any

from lodestar.planning.cost_model import memory, model_flops, seconds
from lodestar.planning.plan import PlanWarnings, describe, encoder_shape, rows_and_steps
from retromae.config import HEAD_LOGITS, PretrainRecipe


def plan(recipe: PretrainRecipe, world_size: int, device: str | None) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = PlanWarnings([])
    rows, steps = rows_and_steps(recipe.data.train, recipe.schedule, recipe.batch.global_size, missing)
    share = recipe.batch.plan(world_size)
    most, length = max(share.rows_per_rank), recipe.model.max_length
    encoder = encoder_shape(recipe.model, missing)
    shape = encoder.deeper(1)  # the decoder's layer; its embeddings and head are the encoder's
    # The head reads 0.3 of the encoder's and all of the decoder's positions.
    head = 6 * most * length * (recipe.mask.encoder + 1) * encoder.width * encoder.vocabulary
    micro_tokens = -(-most // share.num_micro_batches) * length
    # Of one chunk its products and, in half precision, their copy in fp32; of both heads the gradient of the weight.
    tile = min(micro_tokens, HEAD_LOGITS // encoder.vocabulary) * (4 if recipe.precision == "fp32" else 6)
    return describe(
        run=recipe.run,
        batch=recipe.batch,
        schedule=recipe.schedule,
        world_size=world_size,
        rows=rows,
        steps=steps,
        tokens_at_most=None if steps is None else steps * recipe.batch.global_size * length,
        negatives_per_query=0,
        missing=missing,
        device=device,
        checkpoint_bytes=12 * shape.parameters,
        memory=memory(
            shape,
            engine=recipe.engine,
            world_size=world_size,
            precision=recipe.precision,
            tokens_at_once=micro_tokens,
            checkpointing=recipe.model.activation_checkpointing,
            tile=(tile + 2 * 4 * encoder.width) * encoder.vocabulary,
        ),
        seconds=lambda on: seconds(
            shape,
            on,
            world_size=world_size,
            precision=recipe.precision,
            flops=model_flops(shape, most * length, length, passes=3) + head,
        ),
    )
