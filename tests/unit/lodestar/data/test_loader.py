"""Workers of the loader that end before their rank does."""

from __future__ import annotations

import pytest

from lodestar.data.loader import lost_workers_told, step_batches
from lodestar.errors import TrainingError


def reset() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class HandedOver:
    """Read as tensors are: by a socket of the worker, which is closed if that was killed."""

    def __reduce__(self) -> object:
        return reset, ()


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_told_in_one_line() -> None:
    told = r"data\.workers: rank 3: DataLoader worker was killed .* \(if the host"
    with pytest.raises(TrainingError, match=told), lost_workers_told(3):
        list(step_batches(lambda step: HandedOver(), start=0, total=1, workers=1, pin=False))
