"""One rank's share of a step's global batch, as micro-batches of texts of like length with their masks drawn.

Shape suffixes: B texts of a micro-batch, L tokens (padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chassis import chance
from chassis.data import Order, cut, padded
from chassis.encoder import tokenizer_identity
from chassis.errors import DataError
from chassis.schema import BatchPlan
from retromae.config import Data
from retromae.masks import IGNORED, mask_tokens

ROW_FEATURES = datasets.Features({"text": datasets.Value("string")})
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "words": datasets.List(datasets.Value("int16")),
        "tokens": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
    }
)


class Tokenise:
    """Batches of texts -> token ids and, for each token, the number of its word (-1 for special tokens)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, split: bool) -> None:
        self.tokenizer, self.split = tokenizer, split
        sample = tokenizer("a", return_special_tokens_mask=True)
        marks: list[int] = sample["special_tokens_mask"]
        start, end = marks.index(0), len(marks) - marks[::-1].index(0)
        self.before, self.after = sample["input_ids"][:start], sample["input_ids"][end:]
        self.room = max_length - len(self.before) - len(self.after)
        self.special = set(tokenizer.all_special_ids)

    def __call__(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = self.tokenizer(columns["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for i, ids in enumerate(encoded["input_ids"]):
            # a text may spell out a special token; that is no word either
            words = [-1 if n in self.special or w is None else w for n, w in zip(ids, encoded.word_ids(i), strict=True)]
            starts = range(0, len(ids), self.room) if self.split else range(min(1, len(ids)))
            for start in starts:
                part = slice(start, start + self.room)
                self._add(rows, ids[part], words[part], truncated=len(ids) > self.room and not self.split)
        return rows

    def _add(self, rows: dict[str, list[Any]], ids: list[int], words: list[int], *, truncated: bool) -> None:
        first = next((word for word in words if word >= 0), 0)
        numbers = [word - first if word >= 0 else -1 for word in words]
        rows["input_ids"].append([*self.before, *ids, *self.after])
        rows["words"].append([-1] * len(self.before) + numbers + [-1] * len(self.after))
        rows["tokens"].append(len(rows["input_ids"][-1]))
        rows["truncated"].append(truncated)


def check(field: str) -> Any:
    """Accepts rows whose `field` is a text; an empty one is dropped."""
    return _Check(field)


@dataclass(frozen=True)
class _Check:
    field: str

    def __call__(self, where: str, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        text = row.get(self.field)
        if not isinstance(text, str):
            known = ", ".join(row) or "none"
            raise DataError(
                f"{where}: {self.field}: must be a text, got {type(text).__name__} (set data.field; here: {known})"
            )
        return {"text": text} if text.strip() else None


@dataclass(frozen=True)
class MicroBatch:
    """Texts that go through the model at once."""

    masked_BL: Tensor
    """What the encoder reads."""
    labels_BL: Tensor
    """Clean ids where the encoder must guess, -100 elsewhere."""
    clean_BL: Tensor
    words_BL: Tensor
    lengths_B: Tensor
    keys_B: Tensor
    """Of each text, for the decoder's masks."""
    counted_B: Tensor
    """False for a text that only fills an empty place."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """In the order of RetroMAE.forward."""
        return [getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__]

    def pin_memory(self) -> MicroBatch:
        return MicroBatch(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class StepBatch:
    micro_batches: list[MicroBatch]
    rows: int
    tokens: int
    padded_tokens: int
    encoder_labels: int
    decoder_labels: int

    def pin_memory(self) -> StepBatch:
        pinned = [micro_batch.pin_memory() for micro_batch in self.micro_batches]
        return StepBatch(pinned, self.rows, self.tokens, self.padded_tokens, self.encoder_labels, self.decoder_labels)


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    rows: Any
    """(epochs, rows) -> list of {"input_ids", "words"}"""
    order: Order
    plan: BatchPlan
    rank: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    ratio: float

    def __call__(self, step: int) -> StepBatch:
        part = self.plan.rows(self.rank)
        filler = range(0, 1)  # a rank without a row of its own takes part with one that does not count
        epochs, numbers = self.order.batch(step, part if len(part) else filler)
        found = self.rows(epochs, numbers)
        keys = chance.hashed(torch.tensor(chance.key(self.seed, "mask")), epochs, numbers)
        by_length = sorted(range(len(found)), key=lambda i: len(found[i]["input_ids"]))
        micro_batches = []
        for run in cut(by_length, self.plan.passes):
            counted = bool(len(part)) and bool(len(run))
            chosen = list(run) or by_length[:1]
            micro_batches.append(self._micro_batch([found[i] for i in chosen], keys[chosen], counted))
        lengths = [len(row["input_ids"]) for row in found] if len(part) else []
        return StepBatch(
            micro_batches,
            rows=len(part),
            tokens=sum(lengths),
            padded_tokens=sum(m.clean_BL.numel() for m in micro_batches),
            encoder_labels=sum(int((m.labels_BL != IGNORED).sum()) for m in micro_batches),
            decoder_labels=sum(max(0, length - 2) for length in lengths),
        )

    def _micro_batch(self, rows: list[Mapping[str, Any]], keys_B: Tensor, counted: bool) -> MicroBatch:
        clean_BL = padded([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        words_BL = padded([row["words"] for row in rows], -1).short()
        lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
        masked_BL, labels_BL = mask_tokens(
            clean_BL,
            words_BL,
            lengths_B,
            keys_B,
            self.ratio,
            self.tokenizer.mask_token_id,  # type: ignore[arg-type]
            ordinary_ids(self.tokenizer),  # type: ignore[arg-type]
        )
        if not counted:
            labels_BL.fill_(IGNORED)
        counted_B = torch.full((len(rows),), counted)
        return MicroBatch(masked_BL, labels_BL, clean_BL, words_BL, lengths_B, keys_B, counted_B)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) int64: every id that is no special token."""
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special])


class FromCorpus:
    """Rows by number, from the Arrow cache."""

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table.select_columns(["input_ids", "words"])

    def __call__(self, epochs: Tensor, numbers: Tensor) -> list[Mapping[str, Any]]:
        columns = self.table[numbers.tolist()]
        return [{"input_ids": i, "words": w} for i, w in zip(columns["input_ids"], columns["words"], strict=True)]


def settings(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Everything besides the texts that decides what tokenising makes of them."""
    return {
        "stage": "pretrain",
        "field": data.field,
        "long_texts": data.long_texts,
        "max_length": max_length,
        "tokenizer": tokenizer_identity(tokenizer),
    }
