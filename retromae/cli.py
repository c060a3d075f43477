"""The pre-training command: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lodestar.training.command import StageCommand
from retromae.config import PretrainRecipe
from retromae.plan import plan

COMMAND = StageCommand(__doc__ or "", PretrainRecipe, plan, "retromae.task:SPEC")
main = COMMAND.main


def pretrain(recipe: PretrainRecipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
    """Pre-train an encoder, as `lodestar pretrain` does, in this process; returns the folder of the exported model.

    recipe      a PretrainRecipe, its values as a dict, or the path of its YAML file
    overrides   as on the command line: "optim.lr=1e-5"
    Raises as `StageCommand.train`.
    """
    return COMMAND.train(recipe, overrides)
