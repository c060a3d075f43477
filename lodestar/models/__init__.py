"""Encoders and tokenizers, loaded with every tensor checked, and saved for others to open."""
