"""Readers, the order of rows, mixtures of data sets, and loader workers."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import psutil
import pytest
import torch

from lodestar.data.lines import Place
from lodestar.data.loader import cut, step_batches
from lodestar.data.padding import padded
from lodestar.data.readers import count_rows, find_sources, read_rows, stream_rows
from lodestar.data.sampler import DatasetMixture, ShuffledSampler
from lodestar.errors import DataError
from tests import processes, tiny


def test_sources_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": text} for text in tiny.texts(7)]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "c.txt").write_text("\n".join(row["text"] for row in rows))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet", "saved"):
        sources = find_sources([str(tmp_path / name)])
        assert [row for source in sources for _, row in read_rows(source)] == rows, name
        if name != "b.jsonl.gz":
            assert [row for _, _, row in stream_rows(sources[0], Place())] == rows, name
    assert [Path(s.path).name for s in find_sources([str(tmp_path / "*.jsonl*")])] == ["a.jsonl", "b.jsonl.gz"]
    assert count_rows(find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")])) == 14
    assert count_rows(find_sources([str(tmp_path / "d.parquet")])) is None


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "picture.png"])
def test_a_source_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.train: "):
        find_sources([str(tmp_path / name)])


def test_an_epoch_holds_each_row_once_and_the_next_in_another_order() -> None:
    sampler = ShuffledSampler(rows=23, global_size=7, seed=1)
    batches = [sampler.batch(step, range(7)) for step in range(23)]  # 7 epochs
    epochs, rows = (torch.cat([pair[i] for pair in batches]) for i in range(2))
    for epoch in range(7):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(23))
    assert rows[epochs == 0].tolist() != rows[epochs == 1].tolist()


def test_ranks_hold_parts_of_the_same_batch() -> None:
    sampler = ShuffledSampler(rows=50, global_size=9, seed=1)
    whole = sampler.batch(4, range(9))[1].tolist()
    assert [*sampler.batch(4, range(4))[1].tolist(), *sampler.batch(4, range(4, 9))[1].tolist()] == whole
    assert ShuffledSampler(rows=50, global_size=9, seed=2).batch(4, range(9))[1].tolist() != whole


def test_a_mixture_draws_by_weight_and_counts_what_it_drew() -> None:
    mixture = DatasetMixture([1.0, 3.0], steps=4000, seed=5)
    draws = [mixture.at(step) for step in range(4000)]
    assert abs(sum(dataset for dataset, _ in draws) / 4000 - 0.75) < 0.03
    for dataset in (0, 1):
        assert [number for drawn, number in draws if drawn == dataset] == list(
            range(sum(drawn == dataset for drawn, _ in draws))
        )
    assert draws == [DatasetMixture([1.0, 3.0], steps=4000, seed=5).at(step) for step in range(4000)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_steps_whatever_the_workers(workers: int) -> None:
    assert list(step_batches(square, start=3, total=12, workers=workers, pin=False)) == [i * i for i in range(3, 12)]


def square(step: int) -> int:
    return step * step


def test_rows_are_padded_to_a_multiple_of_8_and_cut_evenly() -> None:
    assert padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [4, 9, 9, 9, 9, 9, 9, 9]]
    assert [list(part) for part in cut(range(7), 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(part) for part in cut([1], 3)] == [0, 0, 1]


LOADING = """
import os, sys, time
from lodestar.data.lines import Place
from lodestar.data.loader import step_batches
def collate(step):
    return str((os.getpid(), os.getsid(0)))
batches = step_batches(collate, start=0, total=10**6, workers=2, pin=False)
print(*sorted({next(batches) for _ in range(50)}), os.getsid(0), sep="\\n", flush=True)
for line in sys.stdin:
    print(len({next(batches) for _ in range(50)}), flush=True)
batches.close()
"""


@pytest.fixture
def loading() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with two loader workers, and their ids."""
    process = processes.start([sys.executable, "-c", LOADING], stdin=subprocess.PIPE)
    assert process.stdout is not None
    *lines, own_session = (process.stdout.readline().strip() for _ in range(3))
    workers = [eval(line) for line in lines]
    assert all(session == worker and session != int(own_session) for worker, session in workers)
    try:
        yield process, [worker for worker, _ in workers]
    finally:
        process.kill()
        processes.finish(process, limit_s=30)


def is_running(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


def test_workers_outlive_the_signals_of_launchers(loading: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = loading
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker, number)
    out, _ = processes.finish(process, stdin="more\n", limit_s=60)
    assert out.split() == ["2"] and process.returncode == 0
    assert not any(is_running(worker) for worker in workers)


def test_workers_end_with_their_rank_also_when_it_is_killed(
    loading: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, workers = loading
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + (2 if sys.platform == "linux" else 20)
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its rank"
        time.sleep(0.05)


def test_a_rank_that_fails_does_not_wait_for_its_workers() -> None:
    failing = LOADING.partition("for line")[0] + "raise ZeroDivisionError"
    process = processes.run([sys.executable, "-c", failing], limit_s=60)
    assert process.returncode == 1 and "ZeroDivisionError" in process.stderr
