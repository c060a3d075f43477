"""Stage 2: contrastive fine-tuning."""
