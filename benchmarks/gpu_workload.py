"""The product's two training steps on generated texts: recipe, model, stage, engine, batches; and how they are timed.

Shape suffixes: N texts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

from contrastive.collate import Collate as FinetuneCollate
from contrastive.collate import TrainingDataset
from contrastive.config import FinetuneRecipe
from contrastive.model import BiEncoder
from contrastive.plan import plan as finetune_plan
from contrastive.stage import FinetuneStage
from lodestar.config import loader
from lodestar.data.sampler import DatasetMixture, ShuffledSampler
from lodestar.distributed.runtime import Runtime
from lodestar.models.hidden_states import prepare
from lodestar.models.load import load_encoder
from lodestar.training.ddp import DdpEngine
from retromae.collate import Collate as PretrainCollate
from retromae.collate import EncodedText
from retromae.config import PretrainRecipe
from retromae.model import RetroMAE
from retromae.plan import plan as pretrain_plan
from retromae.stage import PretrainStage

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Sizes:
    """Of the encoder and of one device's part of a step."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 30_522
    texts: int = 30
    text_length: int = 512
    queries: int = 683
    short_length: int = 128
    all_queries: int = 32_768
    repeats: int = 12

    @property
    def encoder_flops(self) -> float:
        """Of the matrix products of one token in all layers, forward."""
        return 2.0 * self.layers * 12 * self.width**2

    @property
    def attention_flops(self) -> float:
        """Of one token for each token that it attends to, in all layers, forward."""
        return 4.0 * self.layers * self.width


TINY = Sizes(2, 64, 2, 500, texts=6, text_length=64, queries=8, short_length=32, all_queries=64, repeats=2)


@dataclass(frozen=True)
class Bench:
    """What all sections need."""

    sizes: Sizes
    device: torch.device
    folder: Path
    """Of the encoder's config.json."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds, after everything that was queued."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Of one call: the mean over calls that are queued one after another."""
        for _ in range(min(warm, repeats)):
            work()
        start = self.now()
        for _ in range(repeats):
            work()
        return (self.now() - start) / repeats


@contextmanager
def bench_on(device: torch.device, sizes: Sizes) -> Iterator[Bench]:
    config = BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
    )
    with TemporaryDirectory() as name:
        config.save_pretrained(name)
        yield Bench(sizes, device, Path(name))


def lengths_of(kind: str, count: int, longest: int, *, median: float, spread: float, seed: int = 0) -> np.ndarray:
    """(N,) tokens of each text: all the longest, or log-normal, cut off there."""
    if kind == "full":
        return np.full(count, longest)
    drawn_N = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return drawn_N.astype(np.int64).clip(4, longest)


@dataclass
class Job:
    """A step of one stage, ready to run."""

    bench: Bench
    module: Any
    stage: Any
    engine: DdpEngine
    batches: Sequence[Any]
    flops: float
    """Useful floating-point operations of a step, on average: of real tokens, one forward and one backward."""
    planned_bytes: int
    collate: Callable[[int], Any]
    scalars: Any = field(default=None)
    steps: int = 0

    def step(self) -> None:
        self.compute()
        self.engine.step(1.0)

    def compute(self) -> None:
        """The gradient of the next step."""
        batch = self.batches[self.steps % len(self.batches)]
        self.scalars = self.stage.backward(batch, self.engine, self.steps % len(self.batches))
        self.steps += 1

    @property
    def tokens(self) -> float:
        """Real ones of a step, on average."""
        return statistics.mean(batch.tokens for batch in self.batches)

    @property
    def padding(self) -> float:
        """Share of the tokens that are padding."""
        return 1 - sum(b.tokens for b in self.batches) / sum(b.padded_tokens for b in self.batches)

    def measure(self, repeats: int | None = None) -> dict[str, Any]:
        """Speed and peak memory of the whole step."""
        if self.bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        repeats = repeats or self.bench.sizes.repeats
        self.bench.seconds(self.step, len(self.batches), warm=0)
        # The median of three: a step of few tokens takes as long as the host, which other work disturbs.
        seconds = statistics.median(self.bench.seconds(self.step, -(-repeats // 3), warm=0) for _ in range(3))
        values = {
            "ms": seconds * 1e3,
            "tokens_per_second": self.tokens / seconds,
            "tflops": self.flops / seconds / 1e12,
            "padding": self.padding,
            "loss": float(self.scalars["loss"]),
            "plan_gib": self.planned_bytes / 2**30,
        }
        if self.bench.on_gpu:
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return values

    def gradient(self) -> Tensor:
        """(N,) fp32, of the first batch; all parameters one after another, on the CPU."""
        self.steps = 0
        self.compute()
        scale = self.engine.values()["loss_scale"]
        grads = [p.grad.flatten().float().cpu() / scale for p in self.module.parameters() if p.grad is not None]
        self.module.zero_grad()
        return torch.cat(grads)


def pretrain(bench: Bench, kind: str, *overrides: str, batches: int = 4) -> Job:
    """The 24gpu recipe on one device: 30 texts a step."""
    sizes = bench.sizes
    recipe = loader.load(
        PretrainRecipe,
        CONFIGS / "pretrain/24gpu.yaml",
        [*_common(bench, sizes.text_length), f"batch.global_size={sizes.texts}", *overrides],
    )
    lengths_N = lengths_of(kind, sizes.texts * batches, sizes.text_length, median=100, spread=1.0)
    is_packed = recipe.model.attention == "packed"
    collate = PretrainCollate(
        Texts(lengths_N, sizes.vocabulary),
        ShuffledSampler(len(lengths_N), sizes.texts, 0, ""),
        recipe.batch.plan(1),
        0,
        0,
        _tokenizer(sizes.vocabulary),
        recipe.mask.encoder,
        is_packed,
    )
    encoder = _encoder(bench, recipe.model, AutoModelForMaskedLM)
    with bench.device:
        module = RetroMAE(
            encoder, mask=recipe.mask, decoder=recipe.decoder, max_length=sizes.text_length, bag_of_words=False
        )
    stage = PretrainStage(weights=recipe.loss.weights, seed=0, device=bench.device)
    tokens, squares = lengths_N.sum() / batches, (lengths_N**2).sum() / batches
    layers = (sizes.layers + 1) / sizes.layers  # the decoder's too
    head = 2 * sizes.width * (sizes.vocabulary + sizes.width) * tokens * (1 + recipe.mask.encoder)
    flops = 3 * (layers * (sizes.encoder_flops * tokens + sizes.attention_flops * squares) + head)
    planned = pretrain_plan(recipe, 1, "h100")["peak_memory_bytes"]
    return _job(bench, recipe, module, stage, collate, batches, flops, planned)


def finetune(bench: Bench, kind: str, *overrides: str, batches: int = 4, queries: int | None = None) -> Job:
    """The 48gpu recipe on one device: 683 queries and their 1,366 passages a step, in one pass where they fit."""
    sizes, queries = bench.sizes, queries or bench.sizes.queries
    recipe = loader.load(
        FinetuneRecipe,
        CONFIGS / "finetune/48gpu.yaml",
        [*_common(bench, sizes.text_length), f"batch.global_size={queries}", *overrides],
    )
    lengths = [sizes.short_length] * 2 if kind == "full" else [32, sizes.short_length]
    query_N = lengths_of(kind, queries * batches, lengths[0], median=10, spread=0.4)
    passage_N = lengths_of(kind, 2 * queries * batches, lengths[1], median=76, spread=0.4, seed=1)
    table = SimpleNamespace(data=_triples(query_N, passage_N, sizes.vocabulary))
    sampler = ShuffledSampler(len(query_N), queries, 0, "0")
    collate = FinetuneCollate(
        datasets=[TrainingDataset(table, sampler, True)],  # type: ignore[arg-type]
        mixture=DatasetMixture([1.0], batches, 0),
        plan=recipe.batch.plan(1),
        rank=0,
        seed=0,
        negatives=1,
        pad_id=0,
        packed=recipe.model.attention == "packed",
    )
    encoder = _encoder(bench, recipe.model, AutoModel, cls_only=True)
    module = BiEncoder(encoder, recipe.loss.temperature)
    stage = FinetuneStage(
        loss=recipe.loss,
        global_size=queries,
        seed=0,
        device=bench.device,
        max_length=sizes.short_length,
        keep_graph=recipe.batch.keep_graph,
        memory_bytes=Runtime(0, 1, 0, bench.device).memory_bytes(),
    )
    all_N = np.concatenate([query_N, passage_N])
    # Unless layers are compiled, the last one gives [CLS] only: of its products keys and values are left, a sixth.
    share = 1.0 if recipe.model.compile else 1 - 5 / 6 / sizes.layers
    flops = 3 * (share * sizes.encoder_flops * all_N.sum() + sizes.attention_flops * (all_N**2).sum()) / batches
    planned = finetune_plan(recipe, 1, "h100")["peak_memory_bytes"]
    return _job(bench, recipe, module, stage, collate, batches, flops, planned)


def _common(bench: Bench, max_length: int) -> list[str]:
    return [
        f"model.encoder={bench.folder}",
        "model.random_weights=true",
        f"model.max_length={max_length}",
        "engine.kind=ddp",
        "track.to=[]",
    ]


def _job(
    bench: Bench, recipe: Any, module: Any, stage: Any, collate: Any, batches: int, flops: float, planned: int
) -> Job:
    runtime = Runtime(0, 1, 0, bench.device)
    module.to(bench.device).train()
    engine = DdpEngine(module, runtime, recipe.optim, recipe.precision, False)
    made = [collate(step) for step in range(batches)]
    if bench.on_gpu:
        made = [batch.pin_memory() for batch in made]
    return Job(bench, module, stage, engine, made, flops, planned, collate)


def _encoder(bench: Bench, model: Any, auto_class: Any, *, cls_only: bool = False) -> Any:
    """The product's, with random weights, created on the device."""
    with bench.device:
        encoder = load_encoder(model, auto_class, seed=0).model
    prepare(encoder, model, bench.device, cls_only=cls_only)
    return encoder


class Texts:
    """Random token ids; a word has 1.3 tokens."""

    def __init__(self, lengths_N: np.ndarray, vocabulary: int) -> None:
        generator, self._lengths_N = np.random.default_rng(1), lengths_N
        self._texts: list[EncodedText] = []
        for length in lengths_N.tolist():
            words = (generator.random(length) < 1 / 1.3).cumsum()
            words[[0, -1]] = -1
            self._texts.append(EncodedText(generator.integers(5, vocabulary, length), words))

    def lengths(self, epochs: Tensor, rows: Tensor) -> np.ndarray:
        return self._lengths_N[rows.numpy()]

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]:
        return [self._texts[row] for row in rows.tolist()]


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    vocabulary = {name: i for i, name in enumerate([*names.values(), *(f"w{i}" for i in range(size - 3))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), **names)


def _triples(query_N: np.ndarray, passage_N: np.ndarray, vocabulary: int) -> pa.Table:
    """Rows of a query, a positive and a negative in the columns of the token cache; no two texts are equal."""
    generator, rows = np.random.default_rng(2), np.arange(len(query_N))

    def texts(lengths: np.ndarray) -> pa.ListArray:
        ids = generator.integers(5, vocabulary, lengths.sum(), dtype=np.int32)
        return pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), ids)

    def one_each(values: Any) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), values)

    columns: dict[str, Any] = {
        "query_ids": texts(query_N),
        "query_hash": pa.array(-1 - rows),
        "most_negatives": pa.array(np.ones_like(rows)),
    }
    for i, kind in enumerate(("pos", "neg")):
        columns[f"{kind}_ids"] = one_each(texts(passage_N[i::2]))
        columns[f"{kind}_hash"] = one_each(pa.array(2 * rows + i))
        no_scores = pa.ListArray.from_arrays(np.zeros(len(rows) + 1, dtype=np.int32), pa.array([], pa.float32()))
        columns[f"{kind}_scores"] = no_scores
    return pa.table(columns)
