"""Stage 2: contrastive fine-tuning, and what a retrieval model needs around it."""
