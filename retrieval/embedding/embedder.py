"""A trained model as a function from texts to embeddings, on one device or several; thin over sentence-transformers.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lodestar.config.schema import Precision
from lodestar.errors import ConfigError
from retrieval.embedding.config import Prompts, Role
from retrieval.embedding.encode_texts import TextEmbeddings, encode_texts
from retrieval.embedding.load_model import load_model
from retrieval.embedding.model_folder import check_folder, check_width
from retrieval.embedding.processes import Encode, worker_processes


class Embedder:
    """`Embedder(folder).encode_queries(texts)` and `.encode_documents(texts)`: (N, D) float32, with each role's prompt.

    Also a context manager: with several devices each has its own process, which `close` ends.
    """

    def __init__(
        self,
        path: str | Path,
        devices: Sequence[str] | None = None,
        *,
        precision: Precision = "fp32",
        batch_tokens: int | None = None,
        width: int | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        """path          a sentence-transformers folder, or a hub name
        devices       as ["cuda:1", "cuda:3"], or ["cpu", "cpu"] for two processes; none: all visible GPUs, or the CPU
        batch_tokens  tokens of one batch on a device, padding included; none: 2,048 on a CPU, 65,536 on a GPU
        width         number of leading dimensions to keep, normalised again (Matryoshka); none: all
        prompts       replace the folder's own, as {"query": "Represent this sentence for searching ...: "}
        Raises ModelError, or ConfigError for a device that does not exist and for a width beyond the model's.
        """
        self._devices = list(devices) if devices else visible_devices()
        check_devices(self._devices)
        check_folder(path)
        check_width(path, width, "width")
        encode = partial(encode_texts, batch_tokens=batch_tokens, precision=precision, width=width)
        self._resources = ExitStack()
        self._encode: Encode
        if len(self._devices) == 1:
            model = load_model(path, self._devices[0], prompts)
            self._encode, model_width = partial(encode, model), model.get_embedding_dimension()
        else:
            self._encode, model_width = self._resources.enter_context(
                worker_processes(str(path), self._devices, prompts or {}, encode)
            )
        self.width: int = min(width or sys.maxsize, model_width or sys.maxsize)
        """Embedding width."""

    def encode_queries(self, texts: Sequence[str] | str) -> np.ndarray:
        return self.encode(texts, "query")

    def encode_documents(self, texts: Sequence[str] | str) -> np.ndarray:
        return self.encode(texts, "document")

    def encode(self, texts: Sequence[str] | str, role: Role) -> np.ndarray:
        """(N, D) float32, in the order of `texts`; (D,) for a single text."""
        if isinstance(texts, str):
            return self.encode([texts], role)[0]
        texts, num_devices = list(texts), len(self._devices)
        result_ND = torch.empty(len(texts), self.width)
        shards = self.stream((texts[i::num_devices], role) for i in range(num_devices))  # in turn: balances long texts
        for i, shard in enumerate(shards):
            result_ND[i::num_devices] = shard.vectors_ND
        return result_ND.numpy()

    def stream(self, jobs: Iterable[tuple[Sequence[str], Role]]) -> Iterator[TextEmbeddings]:
        """The embeddings of each job, in order. As many jobs run at once as there are devices; reads no further."""
        with ThreadPoolExecutor(len(self._devices)) as pool:
            futures: deque[Future[TextEmbeddings]] = deque()
            for texts, role in jobs:
                futures.append(pool.submit(self._encode, texts, role))
                if len(futures) > len(self._devices):
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def visible_devices() -> list[str]:
    """All GPUs, or the CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def check_devices(devices: Sequence[str], field: str = "devices") -> None:
    """ConfigError for a device that this machine does not have."""
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"{field}: {name!r}: unknown kind of device (write cuda:0 or cpu)") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"{field}: {name}: this machine has {torch.cuda.device_count()} GPUs (name one of them)")
