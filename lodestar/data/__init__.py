"""Texts from files to the batches of a step."""
