"""The process group of one run, with equal code and recipes on all ranks and a watchdog."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
from pydantic import BaseModel
from transformers.utils import logging as transformers_logging

import lodestar
from lodestar.config import loader
from lodestar.distributed.collectives import require_same
from lodestar.distributed.runtime import Placement, Runtime, joined
from lodestar.distributed.watchdog import watchdog
from lodestar.imports import imported_uncollected


@contextmanager
def distributed_session(
    placement: Placement, timeout_minutes: float, recipe: BaseModel, stacks: Path | None = None
) -> Iterator[Runtime]:
    """Join the group of all ranks, under a watchdog; ConfigError where ranks have different code or recipes.

    Libraries print on rank 0 only.
    stacks   a folder for the stacks of ranks where one hangs
    """
    quiet(placement.rank == 0)
    with (
        imported_uncollected(),
        joined(placement, timeout_minutes=timeout_minutes) as runtime,
        watchdog(runtime, timeout_minutes, stacks, placement.located),
    ):
        require_same(_code(), "code")
        require_same(loader.flat(recipe, without=["data.cache_dir"]), "recipe")
        yield runtime


def _code() -> dict[str, str]:
    """Versions of what computes, and a hash of our own sources: nodes may have environments of their own."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(lodestar.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    packages = ("lodestar-embeddings", "torch", "transformers", "tokenizers", "deepspeed")
    python = platform.python_version()
    return {"python": python, **versions(packages), "sources of lodestar": digest.hexdigest()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of each package by name; a clone of ours may run without having been installed."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def quiet(main: bool) -> None:
    """Silence progress bars and warnings of libraries; on ranks other than rank 0 all but their errors."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not main:
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
