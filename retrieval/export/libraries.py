"""The optional libraries of the ONNX export. Loads without torch."""

from __future__ import annotations

from lodestar.errors import require


def require_onnx() -> None:
    """ConfigError unless everything that an export needs is installed."""
    for library in ("onnx", "onnxruntime", "onnxscript"):
        require(library, field="onnx", extra="onnx")
