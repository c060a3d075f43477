"""The door of pre-training: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chassis import cli
from chassis.cost import memory, model_flops, seconds
from chassis.plan import Missing, describe, encoder_shape, rows_and_steps
from chassis.runtime import Placement
from retromae.config import HEAD_LOGITS, PretrainRecipe

if TYPE_CHECKING:
    from chassis.prepared import Kind


def main(argv: Sequence[str] | None = None) -> int:
    return cli.door(argv, usage=__doc__ or "", schema=PretrainRecipe, plan=plan, run=run, rehearse=rehearse)


def plan(recipe: PretrainRecipe, world_size: int, device: str | None) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = Missing([])
    rows, steps = rows_and_steps(recipe.data.train, recipe.schedule, recipe.batch.global_size, missing)
    share = recipe.batch.plan(world_size)
    most, length = max(share.rows_per_rank), recipe.model.max_length
    encoder = encoder_shape(recipe.model, missing)
    shape = encoder.deeper(1)  # the decoder's layer; its embeddings and head are the encoder's
    # The head reads 0.3 of the encoder's and all of the decoder's positions.
    head = 6 * most * length * (recipe.mask.encoder + 1) * encoder.width * encoder.vocabulary
    micro_tokens = -(-most // share.passes) * length
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


def run(recipe: PretrainRecipe, placement: Placement) -> int:
    from chassis.session import train  # torch comes in here, after every mistake in the recipe has been told

    return train(recipe, placement, _kind())


def rehearse(recipe: PretrainRecipe, placement: Placement, steps: int) -> int:
    """What `--rehearse` does."""
    from chassis.rehearse import rehearse

    return rehearse(recipe, placement, _kind(), steps)


def _kind() -> Kind:
    from chassis.prepared import Kind
    from retromae.prepare import generate, prepare

    return Kind(prepare, generate, plan)
