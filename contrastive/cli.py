"""The fine-tuning command: torchrun, deepspeed, srun or python launch/finetune.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar import cli
from lodestar.config.loader import recipe_of
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


def finetune(recipe: FinetuneRecipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
    """Fine-tune an encoder, as `lodestar finetune` does, in this process; returns the folder of the exported model.

    recipe      a FinetuneRecipe, its values as a dict, or the path of its YAML file
    overrides   as on the command line: "optim.lr=1e-5"
    Raises ConfigError, DataError, ModelError, CheckpointError or TrainingError; KeyboardInterrupt once a run that was
    asked to stop has saved its checkpoint.
    """
    checked = recipe_of(FinetuneRecipe, recipe, overrides)
    if run(checked, Placement.from_env()):
        raise KeyboardInterrupt
    return Path(checked.run.output_dir) / "model"
