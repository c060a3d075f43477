"""Optional libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lodestar.errors import ConfigError, require


def test_an_optional_library_is_imported_or_named_with_the_extra_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require("json", field="x", extra="y").loads("1") == 1
    (tmp_path / "needs_another.py").write_text("import no_such_library\n")
    (tmp_path / "is_broken.py").write_text("raise ImportError('libx.so: no such file\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    for module, problem in (
        ("faiss", "faiss is not installed"),
        ("needs_another", "no_such_library is not installed"),
        ("is_broken", "is_broken cannot be imported: libx.so: no such file"),
    ):
        with pytest.raises(ConfigError) as told:
            require(module, field="mine", extra="mine")
        assert str(told.value) == f"mine: {problem} (pip install 'lodestar-embeddings[mine]')"
