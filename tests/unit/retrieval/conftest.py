"""What the tests of a trained model share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with a query prompt; the bare encoder is beside it in `plain`."""
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")
