"""One worker process per device, each with its own copy of the model.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from sentence_transformers import SentenceTransformer

from lodestar.errors import LodestarError, ModelError
from retrieval.embedding.config import Prompts, Role
from retrieval.embedding.encode_texts import TextEmbeddings
from retrieval.embedding.load_model import announce_prompts, load_model

EncodeByModel = Callable[[SentenceTransformer, Sequence[str], Role], TextEmbeddings]
Encode = Callable[[Sequence[str], Role], TextEmbeddings]


class WorkerProcesses(NamedTuple):
    encode: Encode
    """Waits for an idle worker and lets it embed; threads may call it at the same time."""
    width: int | None
    """Embedding width of the model, where the model states it."""


@contextmanager
def worker_processes(
    path: str, devices: Sequence[str], prompts: Prompts, encode: EncodeByModel
) -> Iterator[WorkerProcesses]:
    """Start one process per device, which loads the model; all end with the context.

    encode   what each process runs; must be picklable
    """
    prompts = announce_prompts(path, prompts)  # here alone, not in each process
    context = mp.get_context("spawn")
    num_threads = max(1, torch.get_num_threads() // len(devices))
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    workers: list[tuple[BaseProcess, Connection]] = []
    try:
        for device in devices:
            connection, worker_connection = context.Pipe()
            args = (worker_connection, path, device, num_threads, prompts, encode)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            worker_connection.close()
            workers.append((process, connection))
        width = None
        for _, connection in workers:
            width = _receive(connection)
            idle.put(connection)

        def encode_on_idle_worker(texts: Sequence[str], role: Role) -> TextEmbeddings:
            connection = idle.get()
            try:
                connection.send((list(texts), role))
                vectors_ND, truncated = _receive(connection)
                return TextEmbeddings(torch.from_numpy(vectors_ND), truncated)
            finally:
                idle.put(connection)

        yield WorkerProcesses(encode_on_idle_worker, width)
    finally:
        for process, connection in workers:
            connection.close()  # then the process ends by itself
            process.join()


def _receive(connection: Connection) -> Any:
    """The worker's answer; raises what the worker raised."""
    try:
        answer = connection.recv()
    except EOFError:
        raise ModelError("devices: a worker process has ended (see its message above; is memory short?)") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(
    connection: Connection, path: str, device: str, num_threads: int, prompts: Prompts, encode: EncodeByModel
) -> None:
    """Run in a worker: embed what arrives until the connection closes."""
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    try:
        model = load_model(path, device, prompts)
        connection.send(model.get_embedding_dimension())
        while True:
            texts, role = connection.recv()
            vectors_ND, truncated = encode(model, texts, role)
            connection.send((vectors_ND.numpy(), truncated))
    except EOFError:
        pass
    except LodestarError as error:
        connection.send(error)
