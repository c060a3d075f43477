"""The door of pre-training: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chassis import cli
from chassis.plan import Missing, describe, encoder_shape, memory, rows_and_steps
from chassis.runtime import Placement
from chassis.schema import BatchPlan
from retromae.config import PretrainRecipe


def main(argv: Sequence[str] | None = None) -> int:
    return cli.door(argv, usage=__doc__ or "", schema=PretrainRecipe, plan=plan, run=run)


def plan(recipe: PretrainRecipe, world_size: int) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = Missing([])
    rows, steps = rows_and_steps(recipe.data.train, recipe.schedule, recipe.batch.global_size, missing)
    share = BatchPlan(recipe.batch.global_size, world_size, recipe.batch.micro_size)
    texts = -(-max(share.rows_per_rank) // share.passes)
    return describe(
        run=recipe.run,
        batch=recipe.batch,
        schedule=recipe.schedule,
        world_size=world_size,
        rows=rows,
        steps=steps,
        tokens_at_most=None if steps is None else steps * recipe.batch.global_size * recipe.model.max_length,
        negatives_per_query=0,
        missing=missing,
        memory=memory(
            encoder_shape(recipe.model, missing),
            engine=recipe.engine,
            world_size=world_size,
            precision=recipe.precision,
            tokens_at_once=texts * recipe.model.max_length,
            extra_layers=1,
            checkpointing=recipe.model.activation_checkpointing,
        ),
    )


def run(recipe: PretrainRecipe, placement: Placement) -> int:
    from chassis.session import train  # torch comes in here, after every mistake in the recipe has been told
    from retromae.prepare import prepare

    return train(recipe, placement, prepare)
