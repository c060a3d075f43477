"""This rank's texts of a global batch, as micro-batches of similar length, with the encoder's masks.

Shape suffixes: G texts of the global batch, B texts of a micro-batch, L tokens (padded), T tokens (without padding),
N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.columns import Lists, Numbers, Values, column
from lodestar.data.flat import FlatTensors
from lodestar.data.micro_batches import Indices, deal
from lodestar.data.padding import TextShape, is_token, padded
from lodestar.data.sampler import Sampler, examples_hash
from retromae.masks import IGNORED, mask_tokens

if TYPE_CHECKING:
    import datasets  # not needed to run: a bare GPU machine lacks it


class EncodedText(NamedTuple):
    input_ids: Sequence[int] | Values
    words: Sequence[int] | Values
    """Index of each token's word; -1 for special tokens other than [UNK]."""


class Texts(Protocol):
    """Texts by epoch and row."""

    def lengths(self, epochs: Tensor, rows: Tensor) -> Indices:
        """(G,) tokens of each."""
        ...

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]: ...


INPUTS = (
    "masked_input_ids", "input_ids", "words", "lengths", "rng_key", "encoder_index", "encoder_target", "decoder_index",
)  # fmt: skip
"""Tensors of a micro-batch, in the order of RetroMAE.forward."""


@dataclass(frozen=True)
class StepBatch:
    """This rank's texts of one step."""

    tensors: FlatTensors
    """INPUTS of each micro-batch, as `NAME.INDEX`, and `label_counts`."""
    shapes: Sequence[TextShape]
    """Of each micro-batch."""
    numbers: Sequence[int]
    """Of each micro-batch among those of all ranks."""
    examples: int
    tokens: int
    padded_tokens: int
    label_counts: dict[str, int]
    """What each term of the loss is a mean over: tokens to predict, or texts."""
    examples_hash: int = 0
    keeps_all_graphs = False

    @property
    def num_micro_batches(self) -> int:
        return len(self.shapes)

    def inputs(self, index: int) -> list[Any]:
        """The arguments of RetroMAE.forward for a micro-batch."""
        return [*(self.tensors[f"{name}.{index}"] for name in INPUTS), self.shapes[index]]

    def to(self, device: torch.device) -> StepBatch:
        return replace(self, tensors=self.tensors.to(device))

    def pin_memory(self) -> StepBatch:
        return replace(self, tensors=self.tensors.pin_memory())


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    texts_at: Texts
    sampler: Sampler
    plan: BatchPlan
    rank: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    mask_ratio: float
    packed: bool = False

    def __call__(self, step: int) -> StepBatch:
        epochs_G, rows_G = self.sampler.batch(step, range(self.plan.global_size))
        lengths_G = self.texts_at.lengths(epochs_G, rows_G)
        dealt = deal(lengths_G, self.plan, packed=self.packed)
        key_G = rng.hashed(torch.tensor(rng.key(self.seed, "mask")), epochs_G, rows_G)
        tensors: dict[str, Tensor] = {}
        shapes: list[TextShape] = []
        num_labels = 0
        for i, indices in enumerate(dealt.of_rank[self.rank]):
            is_real = bool(len(indices))  # without texts a rank still runs the collectives, on a filler
            indices = torch.from_numpy(indices if is_real else np.array([lengths_G.argmin()]))
            texts = self.texts_at(epochs_G[indices], rows_G[indices])
            micro_batch = self._micro_batch(texts, key_G[indices], is_real)
            tensors |= {f"{name}.{i}": tensor for name, tensor in micro_batch.items()}
            num_labels += len(micro_batch["encoder_index"])
            shapes.append(TextShape.of(micro_batch["lengths"]))
        own_lengths = lengths_G[np.concatenate(dealt.of_rank[self.rank])]
        label_counts = {
            "encoder": num_labels,
            "decoder": int((own_lengths - 2).clip(min=0).sum()),
            "bag_of_words": len(own_lengths),
        }
        positions = self.plan.examples(self.rank)
        part = slice(positions.start, positions.stop)
        return StepBatch(
            FlatTensors.of({**tensors, "label_counts": torch.tensor([*label_counts.values()], dtype=torch.float64)}),
            shapes,
            dealt.numbers[self.rank],
            examples=len(own_lengths),
            examples_hash=examples_hash(positions, epochs_G[part], rows_G[part]),
            tokens=int(own_lengths.sum()),
            padded_tokens=sum(dealt.tokens_of_rank[self.rank]),
            label_counts=label_counts,
        )

    @cached_property
    def _ordinary_ids_V(self) -> Tensor:
        return ordinary_ids(self.tokenizer)  # a walk through the vocabulary

    def _micro_batch(self, texts: list[EncodedText], rng_key_B: Tensor, is_real: bool) -> dict[str, Tensor]:
        """INPUTS by name; a filler has no labels and no words."""
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
        is_token_BL = is_token(lengths_B, input_ids_BL.shape[1])
        is_inner_BL = is_token_BL & is_token(lengths_B - 1, input_ids_BL.shape[1])
        is_inner_BL[:, 0] = False
        if not is_real:
            labels_BL.fill_(IGNORED)
            words_BL.fill_(-1)
            is_inner_BL.fill_(False)
        if self.packed:  # the encoder's tokens lie in one row
            masked_input_ids_BL, labels_BL = masked_input_ids_BL[is_token_BL], labels_BL[is_token_BL]
        has_label = (labels_BL != IGNORED).flatten()
        return {
            "masked_input_ids": masked_input_ids_BL,
            "input_ids": input_ids_BL,
            "words": words_BL,
            "lengths": lengths_B,
            "rng_key": rng_key_B,
            "encoder_index": has_label.nonzero()[:, 0],
            "encoder_target": labels_BL.flatten()[has_label],
            "decoder_index": is_inner_BL.flatten().nonzero()[:, 0],
        }


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) int64: the ids that are no special tokens."""
    special_ids = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special_ids])


class CachedTexts:
    """Texts by their row in the token cache."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table
        self._num_tokens = Numbers(column(table, "tokens")).all

    @cached_property
    def _columns(self) -> tuple[Lists, Lists]:
        return Lists(column(self._table, "input_ids")), Lists(column(self._table, "words"))

    def lengths(self, epochs: Tensor, rows: Tensor) -> Indices:
        return self._num_tokens[rows.numpy()].astype(np.int64)

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]:
        ids, words = (lists[rows.numpy()] for lists in self._columns)
        return [EncodedText(*text) for text in zip(ids, words, strict=True)]
