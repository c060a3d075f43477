"""Stage 1: RetroMAE pre-training."""
