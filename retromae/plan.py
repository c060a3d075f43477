"""What a pre-training run would do: `--plan`. Loads without torch."""

from __future__ import annotations

from contextlib import suppress

from lodestar.config.schema import HALF_PRECISIONS
from lodestar.errors import ModelError
from lodestar.models.folder_checks import check_model
from lodestar.models.pooling_config import pooling_on_disk
from lodestar.planning.cost_model import StepCost, model_flops
from lodestar.planning.encoder import check_encoder, encoder_shape
from lodestar.planning.plan import Plan, PlanWarnings, describe
from retrieval.evaluation.beir import check_beir
from retromae.config import HEAD_LOGITS, PretrainRecipe


def check(recipe: PretrainRecipe) -> None:
    """Raises for what cannot work, as far as the recipe and small files say it: before torch is loaded."""
    check_encoder(recipe.model, lengths={"model.max_length": recipe.model.max_length})
    if recipe.evaluate.data:
        check_beir(recipe.evaluate.data, recipe.evaluate.split)
    check_model(recipe.model)
    pooling_on_disk(recipe.model)


def plan(recipe: PretrainRecipe, world_size: int, device: str | None) -> Plan:
    """The plan of a pre-training run, as `--plan` prints it."""
    with suppress(ModelError):  # a damaged folder is a warning, below
        check_encoder(recipe.model, lengths={"model.max_length": recipe.model.max_length})
    warnings = PlanWarnings()
    if recipe.evaluate.data:
        section = recipe.evaluate
        warnings.or_default(None, lambda: check_beir(section.data or "", section.split), "it cannot be measured")
    batch = recipe.batch.plan(world_size)
    examples, length = max(batch.examples_per_rank), recipe.model.max_length
    encoder = encoder_shape(recipe.model, warnings)
    shape = encoder.deeper(1)  # the decoder's layer; its embeddings and head are the encoder's
    # The head reads 0.3 of the encoder's and all of the decoder's positions.
    head_flops = 6 * examples * length * (recipe.mask.encoder + 1) * encoder.width * encoder.vocabulary
    micro_tokens = -(-examples // batch.num_micro_batches(length)) * length
    if batch.micro_tokens is not None:
        micro_tokens = min(micro_tokens, max(batch.micro_tokens, length))
    # Logits of one tile; gradients of the weight from both uses of the head, and what one tile adds to them.
    logits = min(micro_tokens, HEAD_LOGITS // encoder.vocabulary) * encoder.vocabulary
    logit_bytes = logits * (2 if recipe.precision in HALF_PRECISIONS else 4)
    return describe(
        recipe,
        world_size,
        device,
        train=recipe.data.train,
        cache_dir=recipe.data.cache_dir,
        cost=StepCost(
            shape,
            held_tokens=micro_tokens,
            flops=model_flops(shape, examples * length, length, forwards=3) + head_flops,
            loss_bytes=logit_bytes + 3 * 4 * encoder.width * encoder.vocabulary,
        ),
        tokens_per_example=length,
        negatives_per_query=0,
        warnings=warnings,
    )
