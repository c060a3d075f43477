"""The training loop, its engines, checkpoints and hooks."""
