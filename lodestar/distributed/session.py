"""The group of all ranks of one run: joined, agreed on the recipe, watched."""

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
    """The group of all ranks, which brings the same recipe on each and notices who is lost; libraries speak on the
    first alone."""
    quiet(placement.rank == 0)
    with joined(placement, timeout_minutes=timeout_minutes) as runtime, watchdog(runtime, timeout_minutes):
        require_same(loader.flat(recipe, without=["data.cache_dir"]), "recipe")
        yield runtime


def quiet(main: bool) -> None:
    """What libraries say on their own account is said by no rank, or by the first alone."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not main:
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
