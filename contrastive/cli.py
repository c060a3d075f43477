"""The fine-tuning command: torchrun, deepspeed, srun or python launch/finetune.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar import cli
from lodestar.distributed.runtime import Placement


def main(argv: Sequence[str] | None = None) -> int:
    return cli.entry_point(argv, usage=__doc__ or "", schema=FinetuneRecipe, plan=plan, run=run, rehearse=rehearse)


def run(recipe: FinetuneRecipe, placement: Placement) -> int:
    from contrastive.task import SPEC
    from lodestar.training.trainer import train

    return train(recipe, placement, SPEC)


def rehearse(recipe: FinetuneRecipe, placement: Placement, steps: int) -> int:
    """The dry run of `--rehearse`."""
    from contrastive.task import SPEC
    from lodestar.training.dry_run import rehearse

    return rehearse(recipe, placement, SPEC, steps)
