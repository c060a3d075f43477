"""Stage 1: RetroMAE pre-training."""

from retromae.cli import pretrain

__all__ = ["pretrain"]
