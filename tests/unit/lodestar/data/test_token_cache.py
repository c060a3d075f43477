"""The token cache: built once, read without reading the corpus, rebuilt where it is damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest

from lodestar.data import cache_parts, token_cache, tokenized_shards
from lodestar.data.file_record import RECORD, FileRecord
from lodestar.data.findings import Findings
from lodestar.data.readers import count_rows, find_sources
from lodestar.data.token_cache import TokenizedDataset, print_findings, tokenized
from lodestar.distributed.testing import run_world
from lodestar.errors import DataError
from lodestar.files import write_manifest
from retromae.text_check import TextCheck
from retromae.tokenization import FEATURES as PRETRAIN_FEATURES
from retromae.tokenization import Tokenize as PretrainTokenize
from tests import tiny

FEATURES = datasets.Features(
    {"length": datasets.Value("int32"), "tokens": datasets.Value("int32"), "truncated": datasets.Value("bool")}
)
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


def build(
    tmp_path: Path,
    *names: str,
    processes: int = 1,
    version: int = 1,
    strict: bool = False,
    cache: str = "cache",
    **settings: Any,
) -> TokenizedDataset:
    return tokenized(
        find_sources([str(tmp_path / name) for name in names]),
        cache_dir=tmp_path / cache, settings=settings, tokenize=tokenize, check=check,
        features=FEATURES, processes=processes, version=version, strict=strict,
    )  # fmt: skip


def in_cache(tmp_path: Path) -> list[Path]:
    """What is in the cache, without its locks."""
    return [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_texts_are_tokenised_once_and_again_when_content_or_settings_change(tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    assert build(tmp_path, "a.jsonl").stats == first.stats and calls == before
    assert build(tmp_path, "a.jsonl", max_length=3).stats.fingerprint != first.stats.fingerprint and calls > before
    tiny.pretrain_file(tmp_path / "a.jsonl", 11)
    assert build(tmp_path, "a.jsonl").stats.rows == 11
    assert len(in_cache(tmp_path)) == 3  # nothing unfinished is left


def test_another_version_tokenises_again_and_has_the_same_fingerprint(tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    assert build(tmp_path, "a.jsonl", version=2).stats == first.stats and calls == before + 1
    assert build(tmp_path, "a.jsonl", version=2).stats == first.stats and calls == before + 1
    assert len(in_cache(tmp_path)) == 2


@pytest.mark.parametrize("change", [{"a later count": 1}, {"findings": None}])
def test_the_counts_of_another_version_of_lodestar_are_counted_again(change: dict[str, Any], tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first, before = build(tmp_path, "a.jsonl"), calls
    (folder,) = in_cache(tmp_path)
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
            features=PRETRAIN_FEATURES,
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
    assert in_cache(tmp_path) == []


def test_a_file_that_grows_while_it_is_read_is_an_error_and_leaves_no_cache(tmp_path: Path) -> None:
    path = tiny.pretrain_file(tmp_path / "a.jsonl", 40)

    def growing(where: str, row: Mapping[str, Any], findings: Findings) -> Mapping[str, Any] | None:
        if where.endswith(":40"):
            with path.open("a") as file:
                file.write('{"text": "one more"}\n')
        return check(where, row, findings)

    sources = find_sources([str(path)])
    options: Any = {"cache_dir": tmp_path / "cache", "settings": {}, "tokenize": tokenize, "features": FEATURES}
    options |= {"processes": 1}
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        tokenized(sources, check=growing, **options)
    assert in_cache(tmp_path) == []
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
    (arrow,) = (folder / "rows").rglob("*.arrow")
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


# --- what a second run reads -----------------------------------------------------------------


def make_older(*paths: Path) -> None:
    """As if they had last changed an hour ago, and not in the last two seconds."""
    an_hour_ago = time.time() - 3600
    for path in paths:
        os.utime(path, (an_hour_ago, an_hour_ago))


def overwrite(path: Path, content: bytes) -> None:
    """With as many bytes, and the time of change of before: what a run must not notice if it reads none of them."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_run_reads_no_byte_of_the_corpus_and_a_changed_file_is_read(tmp_path: Path) -> None:
    path = tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    make_older(path)
    first, size = build(tmp_path, "a.jsonl").stats, path.stat().st_size
    overwrite(path, b"?" * size)
    assert build(tmp_path, "a.jsonl").stats == first
    sources = find_sources([str(path)])
    assert count_rows(sources, FileRecord(tmp_path / "cache")) == 10 and count_rows(sources) == 1
    os.utime(path)
    with pytest.raises(DataError, match=r"a\.jsonl:1: row: not valid JSON"):
        build(tmp_path, "a.jsonl")


def test_a_file_that_has_just_changed_is_read_again(tmp_path: Path) -> None:
    path = tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    build(tmp_path, "a.jsonl")
    overwrite(path, b"?" * path.stat().st_size)  # the clock of a file system may not tell these two apart
    with pytest.raises(DataError, match=r"a\.jsonl:1: row: not valid JSON"):
        build(tmp_path, "a.jsonl")


def test_a_cache_is_hashed_once_until_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first = build(tmp_path, "a.jsonl")
    folder = tmp_path / "cache" / first.stats.fingerprint
    rows: Any = first.rows.to_dict()
    (arrow,) = (folder / "rows").rglob("*.arrow")
    make_older(*folder.rglob("*.*"))
    build(tmp_path, "a.jsonl")  # hashes it
    flipped = bytearray(arrow.read_bytes())
    flipped[flipped.rindex(rows["length"][0].to_bytes(4, "little"))] ^= 1
    overwrite(arrow, bytes(flipped))
    assert build(tmp_path, "a.jsonl").rows.to_dict() != rows
    assert "rebuilt" not in capsys.readouterr().err  # not hashed
    os.utime(arrow)
    assert build(tmp_path, "a.jsonl").rows.to_dict() == rows
    assert "data-00000.arrow: damaged: its hash is not the manifest's; rebuilt" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    first = build(tmp_path, "a.jsonl").stats
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for lock in (tmp_path / "cache").glob("*.lock"):
        lock.unlink()
    assert build(tmp_path, "a.jsonl").stats == first and not list((tmp_path / "cache").glob("*.lock"))


# --- several processes -----------------------------------------------------------------------


def build_slowly(
    rank: int, size: int, folder: Path, part_bytes: int, *, shared: bool = True, killed_at: int = 0
) -> tuple[int, int, str]:
    """(rows, texts that this process tokenized, what it said); each part takes a while once all ranks build."""
    cache_parts.PART_BYTES = part_bytes  # of this process alone
    (folder / f"started-{rank}").touch()
    num_calls = 0

    def slowly(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == killed_at:
            psutil.Process().kill()
        while len([*folder.glob("started-*")]) < size:
            time.sleep(0.02)
        time.sleep(0.5)
        return tokenize(columns)

    with redirect_stderr(io.StringIO()) as said:
        dataset = tokenized(
            find_sources([str(folder / "*.jsonl")]),
            cache_dir=folder / ("cache" if shared else f"cache {rank}"), settings={}, tokenize=slowly, check=check,
            features=FEATURES, processes=1,
        )  # fmt: skip
    return len(dataset.rows), num_calls, said.getvalue()


@pytest.mark.parametrize("shared", [True, False])
def test_of_runs_that_share_a_cache_one_builds_a_part_and_the_others_wait(shared: bool, tmp_path: Path) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    outcomes = run_world(partial(build_slowly, shared=shared), 3, tmp_path, cache_parts.PART_BYTES, limit_s=60)
    rows, num_calls, said = zip(*outcomes, strict=True)
    assert rows == (10, 10, 10)
    assert sorted(num_calls) == ([0, 0, 1] if shared else [1, 1, 1])
    waiting = [text.count("waits for process") for text in said]
    assert bool(max(waiting)) == shared and max(waiting) <= 2  # for the part, and for the whole


def many_files(folder: Path) -> None:
    """Seven, of rows that are kept, cut or dropped, and none."""
    tiny.write_jsonl(folder / "0.jsonl", [{"text": "x" * 70}, {"text": ""}, {"text": "y"}])
    (folder / "1.jsonl").touch()
    for number in range(2, 7):
        tiny.pretrain_file(folder / f"{number}.jsonl", 3 + number)


def test_runs_that_share_a_cache_build_its_parts_together(tmp_path: Path) -> None:
    many_files(tmp_path)
    outcomes = run_world(build_slowly, 3, tmp_path, 1, limit_s=60)
    expected, before = build(tmp_path, "*.jsonl", cache="of one part"), calls
    together = build(tmp_path, "*.jsonl")
    assert calls == before
    rows, num_calls, _ = zip(*outcomes, strict=True)
    assert rows == (len(expected.rows),) * 3
    assert sum(num_calls) == 6 and max(num_calls) < 6  # a file without a row goes with the next
    assert together.rows.to_dict() == expected.rows.to_dict() and together.stats == expected.stats
    assert together.stats.findings and len(together.rows.cache_files) == 6
    assert {path.name for path in in_cache(tmp_path)} <= {RECORD, together.stats.fingerprint}


def test_a_run_keeps_the_parts_of_one_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_files(tmp_path)
    with pytest.raises(BrokenProcessPool):
        run_world(partial(build_slowly, killed_at=4), 1, tmp_path, 1, limit_s=60)
    monkeypatch.setattr(cache_parts, "PART_BYTES", 1)
    before = calls
    again = build(tmp_path, "*.jsonl")
    assert calls - before == 6 - 3
    assert again.rows.to_dict() == build(tmp_path, "*.jsonl", cache="of one run").rows.to_dict()


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def leave_parts(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Those of a run that ends before it joins them."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "join_parts", interrupted)
        build(folder, "*.jsonl", **options)


@pytest.mark.parametrize(
    ("name", "content"), [("manifest.json", "{}"), ("manifest.json", '{"format": 1}'), ("part.json", "{}")]
)
def test_a_damaged_part_is_told_once_and_built_anew_alone(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        tiny.pretrain_file(tmp_path / f"{number}.jsonl", 10)
    monkeypatch.setattr(cache_parts, "PART_BYTES", 1)
    leave_parts(tmp_path, monkeypatch)
    damaged = next((tmp_path / "cache").rglob(f"00001/{name}"))
    damaged.write_text(content)
    with pytest.raises(DataError, match=rf"^data\.cache_dir: {damaged.parent}: .*{name}.* \(start again"):
        build(tmp_path, "*.jsonl")
    before = calls
    assert len(build(tmp_path, "*.jsonl").rows) == 20 and calls == before + 1


def test_a_strict_run_leaves_the_parts_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_files(tmp_path)
    leave_parts(tmp_path, monkeypatch)
    with pytest.raises(DataError):
        build(tmp_path, "*.jsonl", strict=True)
    before = calls
    assert build(tmp_path, "*.jsonl").stats.findings and calls == before


@pytest.mark.parametrize("late", ["manifest_hashes", "write_index"])
def test_a_run_whose_parts_another_one_joins_reads_its_cache(
    late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks: the other one is done before this one reads the parts, or writes their index."""
    tiny.pretrain_file(tmp_path / "a.jsonl", 10)
    join, step = cache_parts.join_parts, getattr(cache_parts, late)

    def join_second(*args: Any) -> None:
        def other_first(*of_step: Any) -> Any:
            monkeypatch.setattr(cache_parts, late, step)
            join(*args)
            return step(*of_step)

        monkeypatch.setattr(cache_parts, late, other_first)
        join(*args)

    monkeypatch.setattr(token_cache, "join_parts", join_second)
    assert len(build(tmp_path, "a.jsonl").rows) == 10


def test_rows_keep_their_order_whatever_the_number_of_processes_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 230)
    expected = build(tmp_path, "a.jsonl")
    monkeypatch.setattr(tokenized_shards, "CHUNK_ROWS", 10)
    monkeypatch.setattr(tokenized_shards, "BATCH_BYTES", 400)
    monkeypatch.setattr(tokenized_shards, "SHARD_BYTES", 1000)
    for number in (1, 3):
        shutil.rmtree(tmp_path / "cache")
        dataset = build(tmp_path, "a.jsonl", processes=number)
        assert dataset.rows.to_dict() == expected.rows.to_dict() and dataset.stats == expected.stats
        assert len(dataset.rows.cache_files) > 1
    assert len(expected.rows.cache_files) == 1


def end_process(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    psutil.Process().kill()
    return {}


def test_a_killed_tokenizing_process_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pretrain_file(tmp_path / "a.jsonl", 30)
    monkeypatch.setattr(tokenized_shards, "CHUNK_ROWS", 10)
    with pytest.raises(DataError, match=r"data\.processes: a process that tokenized was killed \("):
        tokenized(
            find_sources([str(tmp_path / "a.jsonl")]),
            cache_dir=tmp_path / "cache", settings={}, tokenize=end_process, check=check, features=FEATURES,
            processes=2,
        )  # fmt: skip
    assert in_cache(tmp_path) == []
