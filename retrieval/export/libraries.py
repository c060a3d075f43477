"""The optional libraries of the ONNX export. Loads without torch."""

from __future__ import annotations

from lodestar.errors import ConfigError


def require_onnx() -> None:
    """ConfigError unless everything that an export needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        problem = f"{error.name or 'a library'} is not installed"
        raise ConfigError(f"onnx: {problem} (pip install 'lodestar-embeddings[onnx]')") from None
