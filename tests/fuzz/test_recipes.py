"""Mutated recipes and overrides: no exception but ours, no hang, no message without its place and remedy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from lodestar.commands import COMMANDS
from lodestar.commands import load as load_target
from lodestar.config.loader import flat, load, recipe_of
from tests.fuzz.mutate import mutate_bytes, mutate_value, refused

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, Any] = {name: load_target(command.recipe) for name, command in COMMANDS.items() if command.recipe}
RECIPES = {path: path.read_bytes() for name in SCHEMAS for path in sorted((ROOT / "configs" / name).glob("*.yaml"))}
NAMES = ["run", "optim", "lr", "data", "train", "model", "models", "tasks", "kind", "path", "weight", "a.b", "<<"]
TEXTS = [
    ".nan", "1e999", "-1", "1000000000000", "9" * 5000, "~", "", "''", "[", "[" * 500, "{a: &a [*a]}", "!!str x",
    "\ud800", "\0", "on", "0x1F", "12:30", "[1, [2]]", "{lr: 1}", '"x', "*", "../x", "sk-" + "a" * 30, "auto", "1.5",
]  # fmt: skip


def fuzz(folder: Path, cases: int, seed: int) -> int:
    """Load mutated recipes, as files, as Python's values and with an override; returns how many were refused."""
    rng, num_refused, path = random.Random(seed), 0, folder / "r.yaml"
    keys = {original: sorted(flat(yaml.safe_load(text))) for original, text in RECIPES.items()}
    for case in range(cases):
        original = rng.choice(list(RECIPES))
        schema, values = SCHEMAS[original.parent.name], yaml.safe_load(RECIPES[original])
        overrides = [
            f"{rng.choice([*keys[original], *NAMES, ''])}{rng.choice(['=', '=', '=', '.x=', ''])}{rng.choice(TEXTS)}"
        ]
        mutated = mutate_value(values, rng, NAMES)
        text = mutate_bytes(RECIPES[original], rng)
        if case % 2:
            text = mutate_bytes(yaml.safe_dump(mutated).encode("utf-8", "surrogatepass"), rng)
        path.write_bytes(text)
        where = f"seed {seed}, case {case}, {original.name}"
        num_refused += refused(lambda path=path, schema=schema: load(schema, path), (where, text[:3000]))
        if isinstance(mutated, dict):
            num_refused += refused(lambda v=mutated, schema=schema: recipe_of(schema, v), (where, str(mutated)[:3000]))
        num_refused += refused(lambda o=original, schema=schema, w=overrides: load(schema, o, w), (where, overrides))
    return num_refused


def test_mutated_recipes_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 200, seed=1) > 200


@pytest.mark.slow
def test_many_mutated_recipes_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 3000, seed=2) > 3000
