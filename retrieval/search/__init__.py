"""Questions to a model and a corpus."""
