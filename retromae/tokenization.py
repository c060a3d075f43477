"""From texts to token ids and word indices.

The published code draws masks from all tokens but "[CLS]" and "[SEP]", so [UNK] is a word here too: in a text of a
language that the vocabulary does not cover, most tokens are [UNK]. Two details differ. In the encoder, that code draws
[UNK] but then neither masks nor labels it, so fewer tokens than `mask.encoder` are predicted; here it is masked like
any word. And [MASK], [PAD] and other special tokens that a text spells out are no words here; there the decoder may
hide them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lodestar.models.load import tokenizer_identity
from retromae.config import DataConfig

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "words": datasets.List(datasets.Value("int16")),
        "tokens": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "without_tokens": datasets.Value("bool"),
        "part": datasets.Value("int32"),
    }
)


class Tokenize:
    """Batches of texts -> token ids and the index of each token's word (-1 for special tokens other than [UNK])."""

    version = 2
    """Version 1 gave [UNK] no word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, split: bool) -> None:
        self.tokenizer, self.split = tokenizer, split
        sample = tokenizer("a", return_special_tokens_mask=True)
        special_mask: list[int] = sample["special_tokens_mask"]
        start, end = special_mask.index(0), len(special_mask) - special_mask[::-1].index(0)
        self.prefix_ids, self.suffix_ids = sample["input_ids"][:start], sample["input_ids"][end:]
        self.max_text_tokens = max_length - len(self.prefix_ids) - len(self.suffix_ids)
        self.no_word_ids = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}

    def __call__(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = self.tokenizer(columns["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for i, ids in enumerate(encoded["input_ids"]):
            # A text may spell out a special token; that is no word either.
            words = [
                -1 if token_id in self.no_word_ids or word is None else word
                for token_id, word in zip(ids, encoded.word_ids(i), strict=True)
            ]
            starts = range(0, len(ids), self.max_text_tokens) if self.split else range(min(1, len(ids)))
            rows["truncated"] += [len(ids) > self.max_text_tokens and not self.split] * len(starts)
            rows["without_tokens"] += [start == 0 and max(words) < 0 for start in starts]
            rows["part"] += range(len(starts))
            for start in starts:
                part = slice(start, start + self.max_text_tokens)
                self._add_row(rows, ids[part], words[part])
        return rows

    def _add_row(self, rows: dict[str, list[Any]], ids: list[int], words: list[int]) -> None:
        first = next((word for word in words if word >= 0), 0)
        from_zero = [word - first if word >= 0 else -1 for word in words]
        rows["input_ids"].append([*self.prefix_ids, *ids, *self.suffix_ids])
        rows["words"].append([-1] * len(self.prefix_ids) + from_zero + [-1] * len(self.suffix_ids))
        rows["tokens"].append(len(rows["input_ids"][-1]))


def settings(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Everything besides the texts that determines their token ids."""
    return {
        "stage": "pretrain",
        "field": data.field,
        "long_texts": data.long_texts,
        "max_length": max_length,
        "tokenizer": tokenizer_identity(tokenizer),
    }
