"""World size, engine, chunking and uneven shares change nothing but rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from chassis.testing import run_world
from tests.distributed import steps

ENGINES = {
    "ddp": ("engine.kind=ddp",),
    **{f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)},
}
OPTIONS = {
    "pretrain": {"plain": (), "one chunk": ("batch.micro_size=19",), "free masks": ("mask.decoder_sets=0",)},
    "finetune": {
        "plain": (),
        "one pass": ("batch.micro_size=19",),
        "distilled": ("loss.distillation=0.5", "data.negatives_per_query=2"),
    },
}
PLAIN = {"pretrain": steps.plain_pretrain, "finetune": steps.plain_finetune}
JOBS = [
    (stage, name, engine)
    for stage, options in OPTIONS.items()
    for name in options
    for engine in ENGINES
    if name == "plain" or engine in ("ddp", "zero2", "zero3")
]
SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-6  # relative, of the loss and of the gradient as one vector: fp32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[tuple[str, str], steps.Outcome]:
    return {(stage, name): PLAIN[stage](folder, *more) for stage, options in OPTIONS.items() for name, more in options.items()}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def found(request: pytest.FixtureRequest, folder: Path, wanted: object) -> dict[tuple[str, str, str], list[steps.Outcome]]:
    jobs = [(stage, *OPTIONS[stage][name], *ENGINES[engine]) for stage, name, engine in JOBS]
    by_rank = run_world(steps.steps, request.param, folder, jobs)
    return {job: [outcomes[i] for outcomes in by_rank] for i, job in enumerate(JOBS)}


@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_a_step_is_the_same_at_any_world_size_engine_and_chunking(job, found, wanted):
    stage, name, _ = job
    for rank, outcome in enumerate(found[job]):
        error = steps.distance(outcome, wanted[stage, name])
        assert error < TOLERANCE, f"rank {rank} of {len(found[job])}: relative error {error:.1e}"


def test_negatives_of_one_rank_alone_give_another_gradient(folder, wanted):
    job = ("finetune", "loss.share_negatives=false")
    for (outcome,) in run_world(steps.steps, 2, folder, [job]):
        assert steps.distance(outcome, wanted["finetune", "plain"]) > 0.01


def test_another_batch_gives_another_gradient(folder, wanted):
    for stage in OPTIONS:
        ((outcome,),) = run_world(steps.steps, 1, folder, [(stage, "run.seed=43")])
        assert steps.distance(outcome, wanted[stage, "plain"]) > 0.01


def test_the_shares_of_the_ranks_make_the_batch_and_none_divides_it():
    for size in SIZES[1:]:
        rows = steps.expected_rows(size)
        assert sum(rows) == steps.ROWS and len(set(rows)) == 2
