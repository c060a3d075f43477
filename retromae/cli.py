"""The door of pre-training: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lodestar import cli
from lodestar.distributed.runtime import Placement
from retromae.config import PretrainRecipe
from retromae.plan import plan

if TYPE_CHECKING:
    from lodestar.training.task import Kind


def main(argv: Sequence[str] | None = None) -> int:
    return cli.door(argv, usage=__doc__ or "", schema=PretrainRecipe, plan=plan, run=run, rehearse=rehearse)


def run(recipe: PretrainRecipe, placement: Placement) -> int:
    from lodestar.training.trainer import train

    return train(recipe, placement, _kind())


def rehearse(recipe: PretrainRecipe, placement: Placement, steps: int) -> int:
    """What `--rehearse` does."""
    from lodestar.training.dry_run import rehearse

    return rehearse(recipe, placement, _kind(), steps)


def _kind() -> Kind:
    from lodestar.training.task import Kind
    from retromae.task import generate, prepare

    return Kind(prepare, generate, plan)
