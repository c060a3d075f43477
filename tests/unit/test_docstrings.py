"""The demo's data, from a small tree of packages made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from examples.docstrings import Docstring, collect, make_encoder, source_files, split, train_tokenizer, write_corpus

REST = "The rows are read one after the other, and those without a key are left out of the result of this function."
SHARED = f"Merge two tables on their keys.\n\n{REST} Both packages describe it in the very same words."


def describe(summary: str) -> str:
    return f'"""{summary}\n\n{REST} It has {len(summary)} of them."""\n'


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    files = {
        "alpha/__init__.py": describe("A package of tables.")
        + f'def merge():\n    """{SHARED}"""\n'
        + 'def short():\n    """Too short to keep."""\n',
        "alpha/io.py": "if True:\n    class Reader:\n        def read(self):\n"
        + "".join(f"            {line}\n" for line in describe("Read a table from a file.").splitlines())
        + 'raise SystemExit("whoever imports this is wrong")\n',
        "alpha/warns.py": describe("Match a pattern of digits.") + 'pattern = "\\d"\n',
        "alpha/broken.py": '"""no end\n',
        "alpha/tests/test_io.py": describe("Test that tables are read."),
        "beta.py": describe("A package of tables."),
        "gamma/_docs.py": "import gamma\n"
        'add_docstr(gamma.shuffle, r"""shuffle(x) -> Table\n\n'
        f'Shuffle the rows of a table.\n\n""" + """{REST}\n{{out}}\n""".format(**common))\n',
        "networkx/__init__.py": describe("Find a path in a graph.")
        + f'def merge():\n    """  {SHARED.upper()}\n    """\n',
    }
    for name, source in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "site"


def test_every_docstring_is_found_once_and_nothing_is_imported(
    packages: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = collect(sorted(source_files(packages)), processes=1)
    assert [d.name for d in found.docstrings] == [
        "alpha",
        "alpha.io.Reader.read",
        "alpha.warns",
        "gamma.shuffle",
        "networkx",
        "networkx.merge",  # held out, so it keeps the text that alpha.merge shares with it
    ]
    assert (found.files, found.broken, found.repeated, found.shared) == (7, 1, 2, 1)
    assert not recwarn.list


def test_the_order_depends_neither_on_processes_nor_on_the_place(packages: Path, tmp_path: Path) -> None:
    alone = collect(sorted(source_files(packages)), processes=1)
    elsewhere = tmp_path / "another" / "place"
    shutil.copytree(packages, elsewhere)
    assert collect(sorted(source_files(packages)), processes=2) == alone
    assert collect(sorted(source_files(elsewhere)), processes=1) == alone
    assert collect(sorted(source_files(packages / "alpha")), processes=1) != alone


def test_no_held_out_text_is_trained_on(packages: Path, tmp_path: Path) -> None:
    counts = write_corpus(collect(sorted(source_files(packages)), processes=1).docstrings, tmp_path / "data")
    trained = (tmp_path / "data" / "pretrain.jsonl").read_text() + (tmp_path / "data" / "finetune.jsonl").read_text()
    assert "Read a table from a file" in trained
    assert "merge" not in trained.lower()
    assert "graph" not in trained
    assert counts["training_texts"] == counts["training_pairs"] == 4


def test_a_training_text_with_a_held_out_passage_is_left_out(tmp_path: Path) -> None:
    docstrings = [
        Docstring("alpha.a", f"Say it in the first way.\n\n{REST}"),
        Docstring("alpha.b", f"Say something else here.\n\nNot: {REST}"),
        Docstring("networkx.a", f"Say it in another way.\n\n{REST.upper()}"),
    ]
    counts = write_corpus(docstrings, tmp_path)
    assert counts["passages_shared_with_heldout"] == 1
    assert [row["query"] for row in rows(tmp_path / "finetune.jsonl")] == ["Say something else here."]


def test_rows_are_in_the_formats_that_the_trainer_reads(tmp_path: Path) -> None:
    docstrings = [
        Docstring("alpha.a", f"Open the named file.\n\n{REST} One."),
        Docstring("alpha.b", f"Open the named file.\n\n{REST} Two."),
        Docstring("networkx.a", f"Walk over the edges.\n\n{REST}"),
        Docstring("networkx.b", f"Walk over the nodes.\n\n{REST}"),
        Docstring("networkx.c", f"Walk over the edges.\n\n{REST} Three."),
    ]
    write_corpus(docstrings, tmp_path)
    assert rows(tmp_path / "pretrain.jsonl") == [{"text": d.text} for d in docstrings[:2]]
    assert rows(tmp_path / "finetune.jsonl") == [
        {"query": "Open the named file.", "pos": [f"{REST} One.", f"{REST} Two."], "neg": []}
    ]
    assert rows(tmp_path / "heldout" / "corpus.jsonl") == [
        {"_id": "networkx.a", "title": "", "text": REST},  # one document for the two with this passage
        {"_id": "networkx.c", "title": "", "text": f"{REST} Three."},
    ]
    assert rows(tmp_path / "heldout" / "queries.jsonl") == [
        {"_id": "q1", "text": "Walk over the edges."},
        {"_id": "q2", "text": "Walk over the nodes."},
    ]
    assert (tmp_path / "heldout" / "qrels" / "test.tsv").read_text().splitlines() == [
        "query-id\tcorpus-id\tscore",
        "q1\tnetworkx.a\t1",
        "q1\tnetworkx.c\t1",
        "q2\tnetworkx.a\t1",
    ]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (f"Sort the rows.\n\n{REST}", ("Sort the rows.", REST)),
        (f"Sort the rows\nby their keys. {REST}", ("Sort the rows by their keys.", REST)),
        (f"Sort the rows, e.g. by key\nArgs:\n    x: {REST}", ("Sort the rows, e.g. by key", f"Args:\n    x: {REST}")),
        (f"sort(x) -> Tensor\n\nSort all the rows.\n\n{REST}", ("Sort all the rows.", REST)),
        (f"Sort the rows.\n\nIt is used to sort the rows in place. {REST}", None),  # the passage holds the query
        ("Sort the rows of this table by all of their keys, one after the other.", None),  # no passage
        (f"Sort.\n\n{REST}", None),  # says too little
        (f">>> sort the rows\n\n{REST}", None),
    ],
)
def test_a_summary_is_a_query_and_the_rest_its_passage(text: str, pair: tuple[str, str] | None) -> None:
    assert split(text) == pair


def test_tokenizer_and_encoder_are_the_same_each_time_and_fit_together(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    texts = [f"{REST} Text {i} of ∑ ∏ ∫." for i in range(50)]
    for folder in (tmp_path / "one", tmp_path / "two"):
        train_tokenizer(texts, folder, vocabulary=200)
        make_encoder(folder)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids = tokenizer("The ROWS are read.", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][0])[:: len(ids["input_ids"][0]) - 1] == ["[CLS]", "[SEP]"]
    assert tokenizer.unk_token_id not in ids["input_ids"]
    logits = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")(**ids).logits
    assert logits.shape == (*ids["input_ids"].shape, len(tokenizer))


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
