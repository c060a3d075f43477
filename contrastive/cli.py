"""The fine-tuning command: torchrun, deepspeed, srun or python launch/finetune.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar.training.command import StageCommand

COMMAND = StageCommand(__doc__ or "", FinetuneRecipe, plan, "contrastive.task:SPEC")
main = COMMAND.main


def finetune(recipe: FinetuneRecipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
    """Fine-tune an encoder, as `lodestar finetune` does, in this process; returns the folder of the exported model.

    recipe      a FinetuneRecipe, its values as a dict, or the path of its YAML file
    overrides   as on the command line: "optim.lr=1e-5"
    Raises as `StageCommand.train`.
    """
    return COMMAND.train(recipe, overrides)
