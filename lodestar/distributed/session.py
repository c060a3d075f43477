"""The process group of one run, with equal recipes on all ranks and a watchdog."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from pydantic import BaseModel
from transformers.utils import logging as transformers_logging

from lodestar.config import loader
from lodestar.distributed.collectives import require_same
from lodestar.distributed.runtime import Placement, Runtime, joined
from lodestar.distributed.watchdog import watchdog


@contextmanager
def distributed_session(placement: Placement, timeout_minutes: float, recipe: BaseModel) -> Iterator[Runtime]:
    """Join the group of all ranks, under a watchdog; ConfigError where ranks have different recipes.

    Libraries print on rank 0 only.
    """
    quiet(placement.rank == 0)
    with joined(placement, timeout_minutes=timeout_minutes) as runtime, watchdog(runtime, timeout_minutes):
        require_same(loader.flat(recipe, without=["data.cache_dir"]), "recipe")
        yield runtime


def quiet(main: bool) -> None:
    """Silence progress bars and warnings of libraries; on ranks other than rank 0 all but their errors."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not main:
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
