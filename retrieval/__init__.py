"""What a trained model is used for: embedding, evaluation, mining, search, export."""
