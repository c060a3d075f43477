"""The recipe of encoding. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import Count, Precision

Role = Literal["query", "document", "text"]
"""text: of a task that neither asks nor answers, as classification; embedded without any prompt."""
Prompts = dict[Literal["query", "document"], str]
"""In place of a folder's own. BGE's folders on the hub have none: give the instruction of their model card."""
Dtype = Literal["float32", "float16", "int8", "binary"]


class Encode(Section):
    devices: list[str] | None = None
    """As [cuda:1, cuda:3], or [cpu, cpu] for two processes; none: all visible GPUs of all ranks, or the CPU."""
    precision: Precision = "fp32"
    batch_tokens: Count | None = None
    """Tokens at once on a device, padding counted; none: 4,096 on a CPU, 65,536 on a GPU."""
    shard_rows: Count = 10_000
    """Rows of a file; what an interrupted run has to do again on each device."""


class Output(Section):
    dir: str
    format: Literal["safetensors", "parquet"] = "safetensors"
    dtype: Dtype = "float32"
    """int8: by the range of each dimension in the first rows; binary: a bit for each dimension, eight to a byte."""
    width: Count | None = None
    """Only the first so many dimensions, normalised again (Matryoshka); none: all."""


class EncodeRecipe(Section):
    """Embeddings of a corpus."""

    model: str
    """A sentence-transformers folder or hub name."""
    texts: Annotated[list[str], Field(min_length=1)]
    """Files (JSONL, Parquet, text; gz too), globs, folders, hub names; or one folder in BEIR's layout."""
    field: str = "text"
    id_field: str | None = None
    """none: `_id` or `id`, or else the number of the row."""
    role: Role = "document"
    """Whose prompt is put before each text; of a BEIR folder also which file is read."""
    encode: Encode = Encode()
    output: Output
    prompts: Prompts = {}
