"""A trained folder as a function from texts to embeddings, on one device or many; thin over sentence-transformers.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lodestar.config.schema import Precision
from lodestar.data.readers import Source
from lodestar.errors import ConfigError, LodestarError, ModelError, first_line
from retrieval.embedding.cache import cached, file_for
from retrieval.embedding.config import Prompts, Role

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import Tensor


class Encoded(NamedTuple):
    vectors_ND: Tensor
    """fp32, on the CPU, in the order of the texts."""
    truncated: int
    """Texts that were longer than the model reads."""


class Embedder:
    """`Embedder(folder).encode_queries(texts)` and `.encode_documents(texts)`: (N, D) float32, by each role's prompt.

    Also a context manager; with several devices each has a process of its own, which `close` ends.
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
        batch_tokens  tokens at once on a device, padding counted; none: 4,096 on a CPU, 65,536 on a GPU
        width         the first so many dimensions, normalised again (Matryoshka); none: all
        prompts       in place of the folder's own, as {"query": "Represent this sentence for searching ...: "}
        Raises ModelError, or ConfigError for a device that is not there.
        """
        self._devices = list(devices) if devices else visible_devices()
        _check(self._devices)
        self._how = {"batch_tokens": batch_tokens, "precision": precision, "width": width}
        self._open = ExitStack()
        if len(self._devices) == 1:
            model = load_model(path, self._devices[0], prompts)
            known = model.get_embedding_dimension()
            self._encode: Callable[[Sequence[str], Role], Encoded] = lambda texts, role: encode_texts(
                model, texts, role, **self._how
            )
        else:
            self._encode, known = self._open.enter_context(
                _processes(str(path), self._devices, prompts or {}, self._how)
            )
        self.width: int = min(width or 2**31, known or 2**31)
        """Of the embeddings."""

    def encode_queries(self, texts: Sequence[str] | str) -> np.ndarray:
        return self.encode(texts, "query")

    def encode_documents(self, texts: Sequence[str] | str) -> np.ndarray:
        return self.encode(texts, "document")

    def encode(self, texts: Sequence[str] | str, role: Role) -> np.ndarray:
        """(N, D) float32, in the order of `texts`; (D,) for a single text."""
        import torch

        if isinstance(texts, str):
            return self.encode([texts], role)[0]
        texts = list(texts)
        parts = [texts[i :: len(self._devices)] for i in range(len(self._devices))]  # turns share out long texts evenly
        found = list(self.stream((part, role) for part in parts))
        result_ND = torch.empty(len(texts), self.width)
        for i, each in enumerate(found):
            result_ND[i :: len(self._devices)] = each.vectors_ND
        return result_ND.numpy()

    def stream(self, jobs: Iterator[tuple[Sequence[str], Role]]) -> Iterator[Encoded]:
        """Each job's embeddings, in order; as many run at once as there are devices, none is read ahead of that."""
        with ThreadPoolExecutor(len(self._devices)) as pool:
            running: queue.SimpleQueue[Any] = queue.SimpleQueue()
            for texts, role in jobs:
                running.put(pool.submit(self._encode, texts, role))
                if running.qsize() > len(self._devices):
                    yield running.get().result()
            while not running.empty():
                yield running.get().result()

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def visible_devices() -> list[str]:
    """All GPUs, or the CPU."""
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _check(devices: Sequence[str]) -> None:
    import torch

    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"devices: {name!r}: no such kind of device (as cuda:0, or cpu)") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"devices: {name}: this machine shows {torch.cuda.device_count()} GPUs (name those)")


# --- one device ------------------------------------------------------------------------------


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Role,
    *,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    width: int | None = None,
    progress: bool = False,
) -> Encoded:
    """By the model's own prompt for the role; sorted by length, as many texts at once as fit into `batch_tokens`."""
    import torch
    from tqdm import tqdm

    no_prompt = partial(model.encode, prompt="")  # nor the model's default one
    encode = {"query": model.encode_query, "document": model.encode_document, "text": no_prompt}[role]
    budget = batch_tokens or (4096 if model.device.type == "cpu" else 65536)
    lengths, truncated = _token_counts(model, texts, role)
    order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    result_ND, computed = torch.empty(len(texts), model.get_embedding_dimension() or 0), None
    bar = tqdm(total=len(texts), unit="text", disable=not progress, leave=False)
    with bar, torch.inference_mode(), torch.autocast(model.device.type, dtype) if dtype else nullcontext():
        for run in _runs(order, lengths, budget):
            batch = [texts[i] for i in run]
            found_RD = encode(batch, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False)
            if found_RD.shape[1] != result_ND.shape[1]:
                result_ND = torch.empty(len(texts), found_RD.shape[1])
            if computed:  # one batch later: the GPU has this one to do meanwhile
                result_ND[computed[0]] = computed[1].float().cpu()
            computed = run, found_RD
            bar.update(len(batch))
        if computed:
            result_ND[computed[0]] = computed[1].float().cpu()
    if not result_ND.isfinite().all():
        raise ModelError(f"embeddings: not all are finite in {precision} (take fp32, or check the model)")
    if width is not None and width < result_ND.shape[1]:
        result_ND = torch.nn.functional.normalize(result_ND[:, :width], dim=1)
    return Encoded(result_ND, truncated)


def _token_counts(model: SentenceTransformer, texts: Sequence[str], role: Role) -> tuple[list[int], int]:
    """(tokens of each text as the model reads it, how many are cut)."""
    prompt = model.prompts.get(role) or ""
    ids = model.tokenizer([prompt + text for text in texts], verbose=False)["input_ids"] if texts else []
    most = model.max_seq_length or 2**31
    return [min(most, len(row)) for row in ids], sum(len(row) > most for row in ids)


def _runs(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[Sequence[int]]:
    """Cuts numbers that are sorted by length, the longest first, so that each run padded holds at most `budget`."""
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def fingerprint(model: str, prompts: Prompts | None = None) -> str:
    """Changes with the weights, the configuration, the tokenizer and the prompts of a folder; a hub name is its own.

    prompts   those that are used in place of the folder's own
    """
    folder, digest = Path(model), hashlib.blake2b(digest_size=12)
    if prompts:
        digest.update(json.dumps(prompts, sort_keys=True).encode())
    if not folder.is_dir():
        return f"{model} {digest.hexdigest()}" if prompts else model
    kinds = ("*.safetensors", "*.bin", "*.json", "*.model", "vocab.txt", "merges.txt")
    for path in sorted(path for kind in kinds for path in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder)} {Source('file', str(path)).fingerprint}\n".encode())
    return digest.hexdigest()


def check_folder(path: str | Path) -> Path:
    """ModelError for a folder that is not there or not in sentence-transformers' format."""
    folder = Path(path)
    local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1  # no hub name has two
    if local and not (folder / "modules.json").is_file():
        # sentence-transformers would put mean pooling on a bare encoder and go on
        what = "no modules.json there" if folder.exists() else "no such folder"
        raise ModelError(f"{path}: {what} (name a sentence-transformers folder, as model/ of a run)")
    return folder


def load_model(path: str | Path, device: torch.device | str, prompts: Prompts | None = None) -> SentenceTransformer:
    """A sentence-transformers folder or hub name; ModelError for anything else, and where tensors are missing.

    prompts   by role, in place of the folder's own
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    from lodestar.models.load import check_vocabulary

    folder = check_folder(path)
    try:
        with _quiet_transformers():
            model = SentenceTransformer(str(path), device=str(device)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be opened: {first_line(error)} (check the name)") from None
    check_vocabulary(model.tokenizer, str(path))
    model.prompts |= prompts or {}
    if missing := _missing(model, folder):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path}: {missing[0]}{more} not in its files (use the folder that the model was saved to)")
    return model


def _missing(model: SentenceTransformer, folder: Path) -> list[str]:
    """Parameters of the encoder that its folder does not hold; transformers draws those at random, with a warning."""
    from safetensors import safe_open
    from transformers import PreTrainedModel

    files = list(folder.glob("*.safetensors"))
    encoder = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if not files or encoder is None:
        return []
    held = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118 (not a dict)
    prefix = f"{encoder.base_model_prefix}."
    names = (name for name, _ in encoder.named_parameters() if not name.startswith("pooler."))  # [CLS] needs no pooler
    return [name for name in names if not held & {name, prefix + name, name.removeprefix(prefix)}]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without a bar for each model, and without its report of tensors: `_missing` says what matters."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


# --- several ---------------------------------------------------------------------------------


@contextmanager
def _processes(
    path: str, devices: Sequence[str], prompts: Prompts, how: dict[str, Any]
) -> Iterator[tuple[Callable[..., Encoded], int | None]]:
    """A process with the model on each device; yields what hands texts to one that is idle, and the model's width."""
    import torch
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    threads = max(1, torch.get_num_threads() // len(devices))
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    started = []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, path, device, threads, prompts, how), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        known = None
        for _, ours in started:
            known = _answer(ours)
            idle.put(ours)

        def encode(texts: Sequence[str], role: Role) -> Encoded:
            connection = idle.get()
            try:
                connection.send((list(texts), role))
                vectors_ND, truncated = _answer(connection)
                return Encoded(torch.from_numpy(vectors_ND), truncated)
            finally:
                idle.put(connection)

        yield encode, known
    finally:
        for process, ours in started:
            ours.close()  # the process ends by itself
            process.join()


def _answer(connection: Connection) -> Any:
    try:
        found = connection.recv()
    except EOFError:
        raise ModelError("devices: a process that encodes has ended (see above; memory?)") from None
    if isinstance(found, Exception):
        raise found
    return found


def _serve(connection: Connection, path: str, device: str, threads: int, prompts: Prompts, how: dict[str, Any]) -> None:
    """Answers texts with their embeddings until the connection is closed."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        model = load_model(path, device, prompts)
        connection.send(model.get_embedding_dimension())
        while True:
            texts, role = connection.recv()
            found = encode_texts(model, texts, role, **how)
            connection.send((found.vectors_ND.numpy(), found.truncated))
    except EOFError:
        pass
    except LodestarError as error:
        connection.send(error)


CACHE_SHARD_ROWS = 100_000
"""Of a file of kept embeddings; what an interrupted run has to do again on each rank."""


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Role,
    *,
    batch_tokens: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
    folder: Path | None = None,
) -> Tensor:
    """(N, D) fp32 on the CPU, in the order of `texts`, with the model's own prompt for the role; "text": without.

    Ranks take the texts in turn, each embeds its own, and every rank gets them all.
    folder   where this model's embeddings are kept; none: nowhere
    """
    import torch

    from lodestar.distributed.collectives import agreed, gather_rows, rank, world_size

    size = world_size()
    with agreed():
        own, how = texts[rank() :: size], {"batch_tokens": batch_tokens, "precision": precision, "progress": progress}
        parts = [own[start : start + CACHE_SHARD_ROWS] for start in range(0, len(own), CACHE_SHARD_ROWS)] or [own]
        found = [
            cached(
                file_for(folder, role, precision, texts=part) if folder else None,
                len(part),
                partial(_embedded, model, part, role, how),
            )
            for part in parts
        ]
        found_ND = found[0] if len(found) == 1 else torch.cat(found)
    if size == 1:
        return found_ND
    turns = [list(range(turn, len(texts), size)) for turn in range(size)]
    gathered_ND = gather_rows(found_ND, [len(turn) for turn in turns])
    return gathered_ND[torch.tensor([i for turn in turns for i in turn]).argsort()]


def _embedded(model: SentenceTransformer, texts: Sequence[str], role: Role, how: dict[str, Any]) -> Tensor:

    return encode_texts(model, texts, role, **how).vectors_ND
