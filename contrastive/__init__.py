"""Stage 2: contrastive fine-tuning."""

from contrastive.cli import finetune

__all__ = ["finetune"]
