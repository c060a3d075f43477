"""This rank's texts of a global batch, as micro-batches of similar length, with the encoder's masks.

Shape suffixes: B texts of a micro-batch, L tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.loader import cut, padded
from lodestar.data.sampler import Sampler, examples_hash
from retromae.masks import IGNORED, mask_tokens


class EncodedText(NamedTuple):
    input_ids: Sequence[int]
    words: Sequence[int]
    """Index of each token's word; -1 for special tokens other than [UNK]."""


@dataclass(frozen=True)
class MicroBatch:
    """Texts that go through the model at once."""

    masked_input_ids_BL: Tensor
    """Input of the encoder."""
    labels_BL: Tensor
    """Clean ids where the encoder must predict them, -100 elsewhere."""
    input_ids_BL: Tensor
    """Clean ids."""
    words_BL: Tensor
    lengths_B: Tensor
    rng_key_B: Tensor
    """int64, the counter-based key of each text, for the decoder's masks."""
    is_real_example_B: Tensor
    """False for a filler: this rank has fewer texts than micro-batches."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """In the order of RetroMAE.forward."""
        return [getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__]

    def pin_memory(self) -> MicroBatch:
        return MicroBatch(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class StepBatch:
    """This rank's texts of one step."""

    micro_batches: list[MicroBatch]
    examples: int
    tokens: int
    padded_tokens: int
    label_counts: dict[str, int]
    """What each term of the loss is a mean over: tokens to predict, or texts."""
    examples_hash: int = 0

    def pin_memory(self) -> StepBatch:
        return replace(self, micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches])


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    texts_at: Callable[[Tensor, Tensor], list[EncodedText]]
    """(epochs, rows) -> the texts of those rows"""
    sampler: Sampler
    plan: BatchPlan
    rank: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    mask_ratio: float

    def __call__(self, step: int) -> StepBatch:
        positions = self.plan.examples(self.rank)
        filler = range(0, 1)  # a rank without examples still runs the collectives, on a filler
        epochs, rows = self.sampler.batch(step, positions if len(positions) else filler)
        texts = self.texts_at(epochs, rows)
        rng_key_N = rng.hashed(torch.tensor(rng.key(self.seed, "mask")), epochs, rows)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i].input_ids))
        micro_batches: list[MicroBatch] = []
        for indices in cut(by_length, self.plan.num_micro_batches):
            is_real = bool(len(positions)) and bool(len(indices))
            indices = list(indices) or by_length[:1]
            micro_batches.append(self._micro_batch([texts[i] for i in indices], rng_key_N[indices], is_real))
        lengths = [len(text.input_ids) for text in texts] if len(positions) else []
        return StepBatch(
            micro_batches,
            examples=len(positions),
            examples_hash=examples_hash(positions, epochs, rows),
            tokens=sum(lengths),
            padded_tokens=sum(m.input_ids_BL.numel() for m in micro_batches),
            label_counts={
                "encoder": sum(int((m.labels_BL != IGNORED).sum()) for m in micro_batches),
                "decoder": sum(max(0, length - 2) for length in lengths),
                "bag_of_words": len(positions),
            },
        )

    @cached_property
    def _ordinary_ids_V(self) -> Tensor:
        return ordinary_ids(self.tokenizer)  # a walk through the vocabulary

    def _micro_batch(self, texts: list[EncodedText], rng_key_B: Tensor, is_real: bool) -> MicroBatch:
        input_ids_BL = padded([text.input_ids for text in texts], self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        words_BL = padded([text.words for text in texts], -1).short()
        lengths_B = torch.tensor([len(text.input_ids) for text in texts])
        masked_input_ids_BL, labels_BL = mask_tokens(
            input_ids_BL,
            words_BL,
            lengths_B,
            rng_key_B,
            self.mask_ratio,
            self.tokenizer.mask_token_id,  # type: ignore[arg-type]
            self._ordinary_ids_V,
        )
        if not is_real:
            labels_BL.fill_(IGNORED)
        is_real_example_B = torch.full((len(texts),), is_real)
        return MicroBatch(
            masked_input_ids_BL, labels_BL, input_ids_BL, words_BL, lengths_B, rng_key_B, is_real_example_B
        )


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) int64: the ids that are no special tokens."""
    special_ids = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special_ids])


class CachedTexts:
    """Texts by their row in the token cache."""

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table.select_columns(["input_ids", "words"])

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]:
        columns = self.table[rows.tolist()]
        return [EncodedText(ids, words) for ids, words in zip(columns["input_ids"], columns["words"], strict=True)]
