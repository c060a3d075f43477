import pytest
import torch
from torch import nn

from contrastive.config import FinetuneRecipe
from contrastive.gradcache import KeepGraph, graph_bytes
from lodestar.config.loader import load
from lodestar.errors import ConfigError

ROWS, WIDTH = 8, 16


def test_the_memory_of_a_graph_is_counted_without_parameters_and_each_storage_once():
    layer, x = nn.Linear(WIDTH, WIDTH), torch.ones(ROWS, WIDTH)
    saved_bytes = graph_bytes(lambda: layer(x).relu().exp().sum())
    # of the input, of relu's output and of exp's output
    assert saved_bytes == 3 * 4 * ROWS * WIDTH
    with torch.no_grad():
        assert graph_bytes(lambda: layer(x).relu().exp().sum()) == 0


@pytest.mark.parametrize(
    ("keep", "memory_bytes", "num_graphs"),
    [(0, 10**9, 0), (2, 0, 2), (9, 0, 3), (0.5, 280, 1), (0.5, 760, 2), (0.5, 2000, 3), (0.5, 270, 0)],
)
def test_as_many_graphs_are_kept_as_the_recipe_says_or_as_fit(keep: float, memory_bytes: int, num_graphs: int):
    weight = torch.ones(10, requires_grad=True)

    def embed(ids_BL: torch.Tensor) -> torch.Tensor:
        """A graph of 40 bytes, and of 10 for each token."""
        x_BLD = torch.ones(5, ids_BL.numel(), dtype=torch.float16, requires_grad=True)
        return weight.exp().sum() + x_BLD.exp().sum()

    assert KeepGraph(keep, memory_bytes, max_length=8).num_graphs([[10, 20, 40], [9, 15, 40]], embed) == num_graphs


def test_a_fraction_above_1_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {output_dir: x}\nmodel: {encoder: x}\ndata: {train: [x]}\noptim: {lr: 1}\nschedule: {steps: 1}\n"
        "batch:\n  global_size: 8\n  keep_graph: 1.5\n"
    )
    with pytest.raises(ConfigError, match="fraction below 1 or a whole number"):
        load(FinetuneRecipe, recipe, [])
