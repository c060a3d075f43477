"""Workers of the loader that end before their rank does."""

from __future__ import annotations

import os
import signal
import time

import pytest

from lodestar.data.loader import lost_workers_told, step_batches
from lodestar.errors import TrainingError


def reset(worker: int | None) -> None:
    if worker is not None:
        os.kill(worker, signal.SIGKILL)
    raise ConnectionResetError(104, "Connection reset by peer")


class HandedOver:
    """Read as tensors are: by a socket of the worker, which is closed if that was killed."""

    def __init__(self, worker_ends: bool) -> None:
        self.worker_ends = worker_ends

    def __reduce__(self) -> object:
        return reset, (os.getpid() if self.worker_ends else None,)


@pytest.mark.parametrize(
    ("worker_ends", "told"), [(True, r"\(pid \d+\) is killed by signal: Killed"), (False, "was killed")]
)
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_told_in_one_line(worker_ends: bool, told: str) -> None:
    told = rf"data\.workers: rank 3: DataLoader worker {told}.* \(if the host"
    with pytest.raises(TrainingError, match=told), lost_workers_told(3):
        list(step_batches(lambda step: HandedOver(worker_ends), start=0, total=1, workers=1, pin=False))
    time.sleep(0.5)  # here a second error of torch's would come
