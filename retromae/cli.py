"""The command of pre-training: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lodestar import cli
from lodestar.distributed.runtime import Placement
from retromae.config import PretrainRecipe
from retromae.plan import plan

if TYPE_CHECKING:
    from lodestar.training.task import TaskSpec


def main(argv: Sequence[str] | None = None) -> int:
    return cli.entry_point(argv, usage=__doc__ or "", schema=PretrainRecipe, plan=plan, run=run, rehearse=rehearse)


def run(recipe: PretrainRecipe, placement: Placement) -> int:
    from lodestar.training.trainer import train

    return train(recipe, placement, _spec())


def rehearse(recipe: PretrainRecipe, placement: Placement, steps: int) -> int:
    """What `--rehearse` does."""
    from lodestar.training.dry_run import rehearse

    return rehearse(recipe, placement, _spec(), steps)


def _spec() -> TaskSpec:
    from lodestar.training.task import TaskSpec
    from retromae.task import build_task, generate

    return TaskSpec(build_task, generate, plan)
