"""Rows of both layouts, and the batch of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from contrastive.collate import Collate, StepBatch, TrainingDataset
from contrastive.tokenization import FEATURES, Tokenize
from lodestar.config.schema import BatchPlan
from lodestar.data.findings import Findings
from lodestar.data.readers import find_sources
from lodestar.data.sampler import DatasetMixture, ShuffledSampler
from lodestar.data.token_cache import tokenized
from lodestar.data.training_examples import check_row, content_hash
from lodestar.errors import ConfigError, DataError
from tests import tiny

TOKENIZER = tiny.tokenizer("bert")


def table(rows: list[dict[str, Any]], query: str = "", passage: str = "") -> datasets.Dataset:
    examples = [check_row(f"f:{i}", row) for i, row in enumerate(rows, 1)]
    columns = {name: [example[name] for example in examples if example] for name in examples[0] or {}}
    return datasets.Dataset.from_dict(Tokenize(TOKENIZER, query, passage, 32, 32)(columns), features=FEATURES)


def step(
    rows: list[dict[str, Any]], *, negatives: int = 1, number: int = 0, rank: int = 0, size: int = 1, batch: int = 0
) -> StepBatch:
    batch = batch or len(rows)
    dataset = TrainingDataset(table(rows), ShuffledSampler(len(rows), batch, 5), True)
    plan = BatchPlan(batch, size, 4)
    return Collate([dataset], DatasetMixture([1.0], 10, 5), plan, rank, 5, negatives, 0)(number)


def world(rows: list[dict[str, Any]], size: int = 1, **options: Any) -> list[StepBatch]:
    """The batches of all ranks."""
    return [step(rows, rank=rank, size=size, **options) for rank in range(size)]


def texts(batches: list[StepBatch]) -> tuple[list[str], list[str]]:
    """The queries and the passages of a step, each embedded by some rank."""
    embedded = [
        TOKENIZER.decode(ids_L[:length], skip_special_tokens=True)
        for batch in batches
        for i, is_real in enumerate(batch.is_real)
        if is_real
        for ids_L, length in zip(*batch.inputs(i)[:2], strict=True)
    ]
    assert len(embedded) == sum(batches[0].texts_per_rank)
    places = (batches[0].tensors[name].tolist() for name in ("query_place_G", "passage_place_M"))
    queries, passages = ([embedded[place] for place in of_kind] for of_kind in places)
    return queries, passages


def test_both_layouts_give_the_same_row() -> None:
    columns = check_row("f:1", {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": None, "negative": "m"})
    bge = check_row("f:1", {"query": "q", "pos": ["p"], "neg": ["n", "m"]})
    assert columns == bge
    assert check_row("f:1", {"query": "q", "pos": ["p"]}) == check_row("f:1", {"anchor": "q", "positive": "p"})
    assert check_row("f:1", {"query": " ", "pos": ["p"]}) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pos": ["p"]}, "f:3: query: must be a text, got NoneType"),
        ({"query": "q", "pos": "p"}, "f:3: pos: must be a list of texts, got str"),
        ({"query": "q", "pos": []}, "f:3: pos: must hold at least one text"),
        ({"query": "q", "pos": [" "]}, "f:3: pos: must hold at least one text"),
        ({"query": "q", "pos": ["p"], "neg": [1]}, "f:3: neg: must be a list of texts, but number 1 is 1"),
        ({"query": "q", "pos": ["p"], "pos_scores": [float("nan")]}, "f:3: pos_scores: must be finite, got NaN"),
        ({"query": "q", "pos": ["p"], "pos_scores": [-1e39]}, "f:3: pos_scores: must be finite, got -1e+39"),
        ({"query": "q", "pos": ["p"], "pos_scores": [10**400]}, "f:3: pos_scores: must be finite, got 1000"),
        ({"query": "q", "pos": ["p"], "neg_scores": 0}, "f:3: neg_scores: must be a list of numbers, got 0"),
        ({"q": "q", "pos": ["p"]}, 'f:3: query: not set, but "q" is (call it query)'),
        ({"query": "q", "posi": ["p"]}, 'f:3: pos: not set, but "posi" is (call it pos)'),
        ({"query": "q", "positive": 4}, 'f:3: pos: not set, but "positive" is (call it pos)'),
        ({"anchor": "q", "positive": 4}, "f:3: positive: must be a text, got int"),
        ({"anchor": "q", "positive": "p", "negative_2": 4}, "f:3: negative_2: must be a text, got int"),
        ({"query": "q", "pos": ["p"], "pos_scores": [1, 2]}, "f:3: pos_scores: 2 scores for 1 texts"),
        ({"query": "q", "pos": ["p"], "pos_scores": ["1"]}, "f:3: pos_scores: must be numbers"),
        ({"query": "q", "pos": ["p"], "type": "odd"}, 'f:3: type: "odd" is not known'),
        ({"query": "q", "pos": ["p"], "prompt": 1}, "f:3: prompt: must be a text, got int"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row("f:3", row)
    assert message in str(caught.value) and str(caught.value).endswith(")")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "pos": ["p"], "negs": ["n"]}, "f:3: negs: unknown field, ignored; 'neg' is not set"),
        ({"anchor": "q", "positive": "p", "negatve": "n"}, "f:3: negatve: unknown field, ignored; 'negative' is not"),
        ({"query": "p ", "pos": [" p"]}, "f:3: pos: a query equals its own positive"),
        ({"query": "q", "pos": ["p"], "neg": ["n", "p "]}, "f:3: neg: a positive is among its row's negatives"),
    ],
)
def test_what_may_be_meant_is_counted_once_and_an_error_where_strict(row: dict[str, Any], message: str) -> None:
    findings = Findings()
    for line in (3, 4, 5):
        check_row(f"f:{line}", row, findings)
    (line,) = findings.warnings
    assert line.startswith(f"warning: {message}") and "; 3 so (" in line and line.endswith(")")
    with pytest.raises(DataError) as caught:
        check_row("f:3", row, Findings(strict=True))
    assert str(caught.value).startswith(message)


def test_fields_of_other_tools_are_no_mistake() -> None:
    row = {
        "query": "q",
        "pos": ["p"],
        "_id": 1,
        "pos_id": [1],
        "neg_id": [2],
        "title": "t",
        "source": "s",
        "negs": None,
    }
    findings = Findings(strict=True)
    assert check_row("f:1", row, findings) and check_row("f:2", {"anchor": "q", "positive": "p", "id": 7}, findings)


def test_an_instruction_leaves_room_for_the_text() -> None:
    Tokenize(TOKENIZER, "search: ", "", 32, 32).check_lengths()
    with pytest.raises(ConfigError, match=r"data\.query_max_length: 4 tokens, of which instruction and special tokens"):
        Tokenize(TOKENIZER, "search rows ", "", 4, 32).check_lengths()


@pytest.mark.parametrize(
    ("kind", "query", "passage"),
    [
        ("normal", "search rows", "index graph"),
        ("symmetric_class", "search rows", "index graph"),
        ("symmetric_sts", "search rows", "search graph"),
        ("symmetric_clustering", "search rows", "search graph"),
    ],
)
def test_instructions_go_where_the_type_says(kind: str, query: str, passage: str) -> None:
    rows = table([{"query": "rows", "pos": ["graph"], "type": kind}], query="search ", passage="index ")
    assert TOKENIZER.decode(rows[0]["query_ids"], skip_special_tokens=True) == query
    assert TOKENIZER.decode(rows[0]["pos_ids"][0], skip_special_tokens=True) == passage


def test_a_rows_own_prompt_replaces_the_instruction() -> None:
    for prompt, query in (("mask ", "mask rows"), ("", "rows"), (None, "search rows")):
        rows = table([{"query": "rows", "pos": ["graph"], "prompt": prompt}], query="search ")
        assert TOKENIZER.decode(rows[0]["query_ids"], skip_special_tokens=True) == query
        assert rows[0]["query_hash"] == content_hash("rows")  # equal texts are recognised whatever their prompts


ROWS = [
    {"query": "rows", "pos": ["graph", "node"], "neg": ["edge", "mask", "token"]},
    {"query": "tensor", "pos": ["matrix"], "neg": []},
    {"query": "search", "pos": ["index"], "neg": ["loss"]},
    {"query": "learn", "pos": ["train"], "neg": ["cache", "file"], "type": "only_1neg"},
]


def groups(batches: list[StepBatch]) -> dict[str, list[str]]:
    """Query -> its passages, the positive first."""
    queries, passages = texts(batches)
    by_query: dict[str, list[str]] = {}
    for batch in batches:
        own_queries = queries[batch.first_query : batch.first_query + batch.examples]
        spans = (batch.tensors[name].tolist() for name in ("start_Q", "count_Q"))
        for query, start, count in zip(own_queries, *spans, strict=True):
            by_query[query] = passages[start : start + count]
    return by_query


def test_each_query_gets_a_positive_and_its_negatives() -> None:
    passages = groups(world(ROWS, negatives=2))
    assert passages["rows"][0] in ("graph", "node") and set(passages["rows"][1:]) < {"edge", "mask", "token"}
    assert len(set(passages["rows"][1:])) == 2
    assert passages["tensor"] == ["matrix"]
    assert passages["search"] == ["index", "loss", "loss"]  # repeated if there are too few
    assert len(passages["learn"]) == 2
    assert all(len(own_passages) == 1 for own_passages in groups(world(ROWS, negatives=0)).values())


def test_positives_and_negatives_are_drawn_in_each_epoch_and_are_reproducible() -> None:
    draws = [tuple(groups(world(ROWS, negatives=1, number=number))["rows"]) for number in range(10)]
    assert len(set(draws)) > 2
    assert draws == [tuple(groups(world(ROWS, negatives=1, number=number))["rows"]) for number in range(10)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_hold_parts_of_the_same_batch(size: int) -> None:
    whole, parts = world(ROWS, negatives=2), world(ROWS, size, negatives=2)
    assert groups(parts) == groups(whole)
    assert len({batch.num_micro_batches for batch in parts}) == 1
    for name in ("query_hash_Q", "passage_hash_P", "owner_P"):
        assert torch.cat([batch.tensors[name] for batch in parts]).equal(whole[0].tensors[name])
    for name in ("examples", "tokens", "examples_hash"):
        assert sum(getattr(batch, name) for batch in parts) % 2**64 == getattr(whole[0], name) % 2**64


def test_a_rank_without_a_query_runs_on_a_filler() -> None:
    batches = world(ROWS[1:2], 3)
    assert [batch.examples for batch in batches] == [0, 0, 1] and groups(batches) == {"tensor": ["matrix"]}
    (idle,) = [batch for batch in batches if not any(batch.is_real)]
    assert idle.num_micro_batches == 1 and idle.tokens == 0 and len(idle.inputs(0)[0]) == 1


def test_teacher_scores_come_with_their_passages() -> None:
    row = {"query": "rows", "pos": ["graph"], "neg": ["edge"], "pos_scores": [0.9], "neg_scores": [0.2]}
    batch = step([row, ROWS[2]])
    index, teacher_QK = texts([batch])[0].index("rows"), batch.tensors["teacher_QK"]
    torch.testing.assert_close(teacher_QK[index], torch.tensor([0.9, 0.2]))
    assert teacher_QK[1 - index].isnan().all()


def test_cut_texts_are_counted() -> None:
    long = " ".join(tiny.texts(3))
    assert table([{"query": "rows", "pos": [long]}])["truncated"] == [True]
    assert table([{"query": "rows", "pos": ["graph"]}])["truncated"] == [False]


# --- rows of real files ----------------------------------------------------------------------

BARE = [{"query": f"search {text}", "pos": [text]} for text in tiny.texts(1100, seed=2)]
LATER: list[dict[str, Any]] = [
    {"query": "q", "pos": ["p"], "prompt": "find: "},
    {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1], "neg_scores": [0.25, 0]},
    {"query": "q", "pos": ["p"], "neg": [], "type": "symmetric_sts"},
    {"query": "q", "pos": ["p"], "neg": None, "prompt": None, "pos_scores": None, "type": None, "id": 7},
    {"anchor": "q", "positive": "p", "negative_1": "n"},
    {"anchor": "q", "positive": "p", "negative_1": None, "more": {"nested": [1]}},
]


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".jsonl":
        return tiny.write_jsonl(path, rows)
    names = dict.fromkeys(name for row in rows for name in row if name != "more")
    datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows]).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("rows", [BARE + LATER, LATER[::-1] + BARE], ids=["bare first", "bare last"])
def test_rows_of_all_kinds_may_be_mixed_in_any_order(rows: list[dict[str, Any]], suffix: str, tmp_path: Path) -> None:
    """Column types must not depend on the first rows of a file."""
    rows_of_file = tokenized(
        find_sources([str(write(rows, tmp_path / f"a.{suffix}"))]),
        cache_dir=tmp_path / "cache",
        settings={},
        tokenize=Tokenize(TOKENIZER, "search: ", "", 32, 32),
        check=check_row,
        features=FEATURES,
        processes=1,
    ).rows
    assert rows_of_file.to_dict() == table(rows, "search: ").to_dict()
    assert sorted(len(neg) for neg in rows_of_file["neg_ids"])[-3:] == [0, 1, 2] and len(rows_of_file) == len(rows)
