"""A whole recipe checked before a run: `lodestar check`."""
