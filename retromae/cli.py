"""The pre-training command: deepspeed, torchrun, srun or python launch/pretrain.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from lodestar.training.command import StageCommand
from retromae.config import PretrainRecipe
from retromae.plan import check, plan

COMMAND = StageCommand(__doc__ or "", PretrainRecipe, plan, check, "retromae.task:SPEC")
main, pretrain = COMMAND.main, COMMAND.train
