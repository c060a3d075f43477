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

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.loader import cut, padded
from lodestar.data.sampler import ShuffledSampler
from retromae.masks import IGNORED, mask_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Texts that go through the model at once."""

    masked_input_ids_BL: Tensor
    """What the encoder reads."""
    labels_BL: Tensor
    """Clean ids where the encoder must guess, -100 elsewhere."""
    input_ids_BL: Tensor
    words_BL: Tensor
    lengths_B: Tensor
    rng_key_B: Tensor
    """Of each text, for the decoder's masks."""
    is_real_example_B: Tensor
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
    order: ShuffledSampler
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
        keys = rng.hashed(torch.tensor(rng.key(self.seed, "mask")), epochs, numbers)
        by_length = sorted(range(len(found)), key=lambda i: len(found[i]["input_ids"]))
        micro_batches = []
        for run in cut(by_length, self.plan.num_micro_batches):
            counted = bool(len(part)) and bool(len(run))
            chosen = list(run) or by_length[:1]
            micro_batches.append(self._micro_batch([found[i] for i in chosen], keys[chosen], counted))
        lengths = [len(row["input_ids"]) for row in found] if len(part) else []
        return StepBatch(
            micro_batches,
            rows=len(part),
            tokens=sum(lengths),
            padded_tokens=sum(m.input_ids_BL.numel() for m in micro_batches),
            encoder_labels=sum(int((m.labels_BL != IGNORED).sum()) for m in micro_batches),
            decoder_labels=sum(max(0, length - 2) for length in lengths),
        )

    def _micro_batch(self, rows: list[Mapping[str, Any]], rng_key_B: Tensor, counted: bool) -> MicroBatch:
        input_ids_BL = padded([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        words_BL = padded([row["words"] for row in rows], -1).short()
        lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
        masked_input_ids_BL, labels_BL = mask_tokens(
            input_ids_BL,
            words_BL,
            lengths_B,
            rng_key_B,
            self.ratio,
            self.tokenizer.mask_token_id,  # type: ignore[arg-type]
            ordinary_ids(self.tokenizer),  # type: ignore[arg-type]
        )
        if not counted:
            labels_BL.fill_(IGNORED)
        is_real_example_B = torch.full((len(rows),), counted)
        return MicroBatch(
            masked_input_ids_BL, labels_BL, input_ids_BL, words_BL, lengths_B, rng_key_B, is_real_example_B
        )


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
