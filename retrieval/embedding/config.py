"""The recipe of encoding. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import Precision
from lodestar.config.values import Count, Location, Width

Role = Literal["query", "document", "text"]
"""text: neither a query nor a document, as in classification; embedded without any prompt."""
Prompts = dict[Literal["query", "document"], str]
"""Replace the prompts of the model folder. BGE's folders on the hub have none: copy the instruction of the model card.
"""
Dtype = Literal["float32", "float16", "int8", "binary"]


class EncodeConfig(Section):
    devices: Annotated[list[str], Field(min_length=1)] | None = None
    """As [cuda:1, cuda:3], or [cpu, cpu] for two processes; none: all visible GPUs of all ranks, or the CPU."""
    precision: Precision = "fp32"
    batch_tokens: Count | None = None
    """Tokens of one batch on a device, padding included; none: 2,048 on a CPU, 65,536 on a GPU."""
    shard_rows: Count = 10_000
    """Rows of one file. An interrupted run repeats at most this many on each device."""


class OutputConfig(Section):
    dir: Location
    format: Literal["safetensors", "parquet"] = "safetensors"
    dtype: Dtype = "float32"
    """int8: scaled by the range of each dimension in the first rows; binary: one bit per dimension, eight to a byte."""
    width: Width | None = None
    """Keep only this many leading dimensions and normalise again (Matryoshka); none: all."""


class EncodeRecipe(Section):
    """Embeddings of a corpus."""

    model: Location
    """A sentence-transformers folder or hub name."""
    texts: Annotated[list[Location], Field(min_length=1)]
    """Files (JSONL, Parquet, text; gz too), globs, folders, hub names; or one folder in BEIR's layout."""
    field: Annotated[str, Field(min_length=1)] = "text"
    id_field: Annotated[str, Field(min_length=1)] | None = None
    """none: `_id` or `id`, or else the number of the row."""
    role: Role = "document"
    """Whose prompt precedes each text. In a BEIR folder it also selects the file: queries or corpus."""
    encode: EncodeConfig = EncodeConfig()
    output: OutputConfig
    prompts: Prompts = {}
