"""World size, engine, micro-batches and uneven parts of ranks change nothing but rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lodestar.distributed.testing import run_world
from tests.distributed import steps

OPTIONS = {
    "pretrain": {
        "plain": (),
        "one micro-batch": ("batch.micro_size=19",),
        "free masks": ("mask.decoder_sets=0",),
        "by tokens": ("batch.micro_tokens=96",),
        "packed": ("batch.micro_tokens=96", "model.attention=packed", "loss.bag_of_words=0.1"),
        "words": ("loss.bag_of_words=0.1", "decoder.query=embedding"),
    },
    "finetune": {
        "plain": (),
        "one micro-batch": ("batch.micro_size=19",),
        "matryoshka": ("loss.matryoshka=[4,8]",),
        "directions": ("loss.passage_to_query=1", "loss.query_to_query=0.5", "loss.passage_to_passage=0.25"),
        "learned temperature": ("loss.learn_temperature=true", "loss.distillation=0.5", "loss.matryoshka=[8]"),
        "mean pooling": ("model.pooling=mean",),
        "by tokens": ("batch.micro_tokens=96",),
        "packed": ("batch.micro_tokens=96", "model.attention=packed", "model.pooling=mean"),
        "kept graphs": ("batch.keep_graph=2",),
        "distilled": ("loss.distillation=0.5", "data.negatives_per_query=2"),
    },
}
PLAIN = {"pretrain": steps.plain_pretrain, "finetune": steps.plain_finetune}
JOBS = [
    (stage, name, engine)
    for stage, options in OPTIONS.items()
    for name in options
    for engine in steps.ENGINES
    if name == "plain" or engine in ("ddp", "zero2", "zero3")
]
SIZES = (1, 2, 3, 4)
ROUNDING = 1e-6  # relative, of the loss and of the gradient as one vector: fp32 sums in another order
SINGLE = 5e-6  # the same, of one fp32 step against double precision: what a tiny encoder itself loses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def exact(folder: Path) -> dict[tuple[str, str], steps.Outcome]:
    """Plain formulas on the whole batch, in fp64."""
    return {
        (stage, name): PLAIN[stage](folder, *overrides)
        for stage, options in OPTIONS.items()
        for name, overrides in options.items()
    }


@pytest.fixture(scope="module")
def reference(folder: Path, exact: object) -> dict[tuple[str, str], steps.Outcome]:
    """One process, DDP, the whole batch in one micro-batch."""
    names = [(stage, name) for stage in OPTIONS for name in OPTIONS[stage]]
    jobs = [(stage, *OPTIONS[stage][name], *steps.ENGINES["ddp"], "batch.micro_size=19") for stage, name in names]
    (outcomes,) = run_world(steps.steps, 1, folder, jobs)
    return dict(zip(names, outcomes, strict=True))


PARAMS = [pytest.param(size, marks=() if size == 3 else pytest.mark.slow) for size in SIZES]


@pytest.fixture(scope="module", params=PARAMS, ids=lambda size: f"{size} ranks")
def outcomes_of(
    request: pytest.FixtureRequest, folder: Path, exact: object
) -> dict[tuple[str, str, str], list[steps.Outcome]]:
    jobs = [(stage, *OPTIONS[stage][name], *steps.ENGINES[engine]) for stage, name, engine in JOBS]
    by_rank = run_world(steps.steps, request.param, folder, jobs)
    return {job: [outcomes[i] for outcomes in by_rank] for i, job in enumerate(JOBS)}


def test_the_reference_is_what_plain_formulas_give_in_double_precision(reference, exact):
    for name, outcome in reference.items():
        error = steps.distance(outcome, exact[name])
        assert error < SINGLE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_a_step_is_the_same_at_any_world_size_engine_and_micro_batches(job, outcomes_of, reference):
    stage, name, _ = job
    for rank, outcome in enumerate(outcomes_of[job]):
        error = steps.distance(outcome, reference[stage, name])
        assert error < ROUNDING, f"rank {rank} of {len(outcomes_of[job])}: relative error {error:.1e}"


def test_negatives_of_one_rank_alone_give_another_gradient(folder, reference):
    job = ("finetune", "loss.share_negatives=false")
    for (outcome,) in run_world(steps.steps, 2, folder, [job]):
        assert steps.distance(outcome, reference["finetune", "plain"]) > 0.01


def test_another_batch_gives_another_gradient(folder, reference):
    for stage in OPTIONS:
        ((outcome,),) = run_world(steps.steps, 1, folder, [(stage, "run.seed=43")])
        assert steps.distance(outcome, reference[stage, "plain"]) > 0.01


def test_the_ranks_parts_make_the_batch_and_no_world_size_divides_it():
    for size in SIZES[1:]:
        examples = steps.expected_examples(size)
        assert sum(examples) == steps.GLOBAL_SIZE and len(set(examples)) == 2
