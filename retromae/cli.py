"""The pre-training command: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lodestar import cli
from lodestar.config.loader import recipe_of
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


def pretrain(recipe: PretrainRecipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
    """Pre-train an encoder, as `lodestar pretrain` does, in this process; returns the folder of the exported model.

    recipe      a PretrainRecipe, its values as a dict, or the path of its YAML file
    overrides   as on the command line: "schedule.steps=1000"
    Raises ConfigError, DataError, ModelError, CheckpointError or TrainingError; KeyboardInterrupt once a run that was
    asked to stop has saved its checkpoint.
    """
    checked = recipe_of(PretrainRecipe, recipe, overrides)
    if run(checked, Placement.from_env()):
        raise KeyboardInterrupt
    return Path(checked.run.output_dir) / "model"
