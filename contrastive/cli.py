"""The fine-tuning command: torchrun, deepspeed, srun or python launch/finetune.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from contrastive.config import FinetuneRecipe
from contrastive.plan import check, plan
from lodestar.training.command import StageCommand

COMMAND = StageCommand(__doc__ or "", FinetuneRecipe, plan, check, "contrastive.task:SPEC")
main, finetune = COMMAND.main, COMMAND.train
