"""The token cache, the order of rows, mixtures of data sets, and loader workers."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch

from lodestar.data.findings import Findings
from lodestar.data.loader import cut, step_batches
from lodestar.data.padding import padded
from lodestar.data.readers import count_rows, find_sources, read_rows, stream_rows
from lodestar.data.sampler import DatasetMixture, ShuffledSampler
from lodestar.data.token_cache import TokenizedDataset, print_findings, tokenized
from lodestar.errors import DataError
from lodestar.files import write_manifest
from retromae.text_check import TextCheck
from retromae.tokenization import FEATURES as PRETRAIN_FEATURES
from retromae.tokenization import Tokenize as PretrainTokenize
from tests import processes, tiny

FEATURES = datasets.Features(
    {"length": datasets.Value("int32"), "tokens": datasets.Value("int32"), "truncated": datasets.Value("bool")}
)
ROW_FEATURES = datasets.Features({"text": datasets.Value("string")})
calls = 0


def tokenize(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    global calls
    calls += 1
    lengths = [len(text) for text in columns["text"]]
    return {"length": lengths, "tokens": lengths, "truncated": [length > 60 for length in lengths]}


def check(where: str, row: Mapping[str, Any], findings: Findings) -> Mapping[str, Any] | None:
    if "text" not in row:
        raise DataError(f"{where}: text: missing")
    return {"text": row["text"]} if row["text"] else None


def build(tmp_path: Path, *names: str, version: int = 1, strict: bool = False, **settings: Any) -> TokenizedDataset:
    return tokenized(
        find_sources([str(tmp_path / name) for name in names]),
        cache_dir=tmp_path / "cache", settings=settings, tokenize=tokenize, check=check,
        row_features=ROW_FEATURES, features=FEATURES, processes=1, version=version, strict=strict,
    )  # fmt: skip


def test_texts_are_tokenised_once_and_again_when_content_or_settings_change(tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    assert build(tmp_path, "a.jsonl").stats == first.stats and calls == before
    assert build(tmp_path, "a.jsonl", max_length=3).stats.fingerprint != first.stats.fingerprint and calls > before
    tiny.pretrain_file(tmp_path / "a.jsonl", 11)
    assert build(tmp_path, "a.jsonl").stats.rows == 11
    assert not list((tmp_path / "cache").glob(".*"))  # nothing unfinished is left


def test_another_version_tokenises_again_and_has_the_same_fingerprint(tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    assert build(tmp_path, "a.jsonl", version=2).stats == first.stats and calls == before + 1
    assert build(tmp_path, "a.jsonl", version=2).stats == first.stats and calls == before + 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("change", [{"a later count": 1}, {"findings": None}])
def test_the_counts_of_another_version_of_lodestar_are_counted_again(change: dict[str, Any], tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    (folder,) = (tmp_path / "cache").iterdir()
    values = json.loads((folder / "facts.json").read_text()) | change
    (folder / "facts.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert build(tmp_path, "a.jsonl").stats == first.stats and calls == before + 1


def test_every_dropped_and_cut_text_is_counted(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 70}, {"text": ""}, {"text": "y"}])
    stats = build(tmp_path, "a.jsonl").stats
    assert (stats.rows, stats.tokens, stats.truncated, stats.dropped) == (2, 71, 1, 1)


def test_what_is_found_is_kept_with_the_cache_and_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 3)
    (tmp_path / "empty.jsonl").touch()
    for _ in range(2):
        print_findings([build(tmp_path, "a.jsonl", "empty.jsonl").stats])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert line.startswith(f"warning: {tmp_path}/empty.jsonl:1: row: a file is empty; 1 so (") and line[-1] == ")"
    for _ in range(2):
        with pytest.raises(DataError, match=r"empty\.jsonl:1: row: a file is empty"):
            build(tmp_path, "a.jsonl", "empty.jsonl", strict=True)
        shutil.rmtree(tmp_path / "cache")


def test_texts_without_a_token_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in ("rows " * 40, "\u200b\x01", "[CLS] [SEP]", " ", "graph")]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    for split, num_rows in ((False, 3), (True, 5)):
        stats = tokenized(
            find_sources([str(tmp_path / "a.jsonl")]),
            cache_dir=tmp_path / "cache", settings={"split": split}, check=TextCheck("text"), processes=1,
            tokenize=PretrainTokenize(tiny.tokenizer("bert"), max_length=16, split=split),
            row_features=ROW_FEATURES, features=PRETRAIN_FEATURES,
        ).stats  # fmt: skip
        assert (stats.rows, stats.truncated, stats.dropped, stats.without_tokens) == (num_rows, not split, 2, 2)
    (finding,) = stats.findings.values()
    assert finding["count"] == 2


def test_a_bad_row_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: text: missing"):
        build(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: row: not valid JSON"):
        build(tmp_path, "b.jsonl")
    tiny.write_jsonl(tmp_path / "c.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="no row is left"):
        build(tmp_path, "c.jsonl")
    assert list((tmp_path / "cache").iterdir()) == []


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
            assert [row for _, row in stream_rows(sources)] == rows, name
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


def test_a_file_that_grows_while_it_is_read_is_an_error_and_leaves_no_cache(tmp_path: Path) -> None:
    path = tiny.pretrain_file(tmp_path / "a.jsonl", 40)

    def growing(where: str, row: Mapping[str, Any], findings: Findings) -> Mapping[str, Any] | None:
        if where.endswith(":40"):
            with path.open("a") as file:
                file.write('{"text": "one more"}\n')
        return check(where, row, findings)

    sources = find_sources([str(path)])
    options: Any = {"cache_dir": tmp_path / "cache", "settings": {}, "tokenize": tokenize, "features": FEATURES}
    options |= {"row_features": ROW_FEATURES, "processes": 1}
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        tokenized(sources, check=growing, **options)
    assert list((tmp_path / "cache").iterdir()) == []
    tiny.pretrain_file(path, 40)
    assert tokenized(sources, check=check, **options).stats.rows == 40


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no manifest", "emptied"])
def test_a_damaged_cache_is_rebuilt_with_one_line(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first = build(tmp_path, "a.jsonl")
    rows, stats = first.rows.to_dict(), first.stats
    folder = tmp_path / "cache" / stats.fingerprint
    (arrow,) = (folder / "rows").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        (folder / "facts.json").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "facts.json").write_text("")
    capsys.readouterr()
    again = build(tmp_path, "a.jsonl")
    assert again.rows.to_dict() == rows and again.stats == stats
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert str(folder) in line and "rebuilt" in line
    build(tmp_path, "a.jsonl")
    assert "warning" not in capsys.readouterr().err


LOADING = """
import os, sys, time
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
