"""The pre-training command: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence

from lodestar import cli
from lodestar.distributed.runtime import Placement
from retromae.config import PretrainRecipe
from retromae.plan import plan


def main(argv: Sequence[str] | None = None) -> int:
    return cli.entry_point(argv, usage=__doc__ or "", schema=PretrainRecipe, plan=plan, run=run, rehearse=rehearse)


def run(recipe: PretrainRecipe, placement: Placement) -> int:
    from lodestar.training.trainer import train
    from retromae.task import SPEC

    return train(recipe, placement, SPEC)


def rehearse(recipe: PretrainRecipe, placement: Placement, steps: int) -> int:
    """The dry run of `--rehearse`."""
    from lodestar.training.dry_run import rehearse
    from retromae.task import SPEC

    return rehearse(recipe, placement, SPEC, steps)
