"""Recipes: strict YAML, and the sections that both stages share. Loads without torch."""
