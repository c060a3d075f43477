"""From checked training rows to token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lodestar.data.training_examples import SCORES, content_hash, instructions
from lodestar.errors import ConfigError
from lodestar.models.load import tokenizer_identity

_TEXT = datasets.List(datasets.Value("int32"))


FEATURES = datasets.Features(
    {
        "query_ids": _TEXT,
        "query_hash": datasets.Value("int64"),
        "pos_ids": datasets.List(_TEXT),
        "pos_hash": datasets.List(datasets.Value("int64")),
        "neg_ids": datasets.List(_TEXT),
        "neg_hash": datasets.List(datasets.Value("int64")),
        "pos_scores": SCORES,
        "neg_scores": SCORES,
        "most_negatives": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "without_tokens": datasets.Value("bool"),
    }
)


_UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Tokenize:
    """Batches of checked rows -> token ids of each query and passage, with its instruction."""

    tokenizer: PreTrainedTokenizerBase
    query_instruction: str
    passage_instruction: str
    query_max_length: int
    passage_max_length: int

    def __call__(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
        queries, passages = [], []
        for query, prompt, kind, pos, neg in zip(
            *(columns[n] for n in ("query", "prompt", "type", "pos", "neg")), strict=True
        ):
            before_query, before_passage = instructions(kind, prompt, self.query_instruction, self.passage_instruction)
            queries.append(before_query + query)
            passages += [before_passage + text for text in (*pos, *neg)]
        query_ids, query_truncated = self._encode(queries, self.query_max_length)
        passage_ids, passage_truncated = self._encode(passages, self.passage_max_length)
        start = 0
        for i, query in enumerate(columns["query"]):
            pos, neg, kind = columns["pos"][i], columns["neg"][i], columns["type"][i]
            end = start + len(pos) + len(neg)
            values = {
                "query_ids": query_ids[i],
                "query_hash": content_hash(query),
                "pos_ids": passage_ids[start : start + len(pos)],
                "pos_hash": [content_hash(text) for text in pos],
                "neg_ids": passage_ids[start + len(pos) : end],
                "neg_hash": [content_hash(text) for text in neg],
                "pos_scores": columns["pos_scores"][i],
                "neg_scores": columns["neg_scores"][i],
                "most_negatives": {"only_1neg": 1, "symmetric_class": len(neg)}.get(kind, _UNLIMITED),
                "tokens": len(query_ids[i]) + sum(map(len, passage_ids[start:end])),
                "truncated": query_truncated[i] or any(passage_truncated[start:end]),
                "without_tokens": not all(map(self._has_token, (query_ids[i], *passage_ids[start:end]))),
            }
            for name, value in values.items():
                rows[name].append(value)
            start = end
        return rows

    def check_lengths(self) -> None:
        """ConfigError where an instruction leaves no token for the text after it."""
        roles = {
            "query": (self.query_instruction, self.query_max_length),
            "passage": (self.passage_instruction, self.passage_max_length),
        }
        for role, (instruction, max_length) in roles.items():
            needed = len(self.tokenizer(instruction)["input_ids"])
            if max_length <= needed:
                problem = f"{max_length} tokens, of which instruction and special tokens take {needed}"
                raise ConfigError(f"data.{role}_max_length: {problem} (raise it, or model.max_length)")

    def _has_token(self, ids: list[int]) -> bool:
        return not self._special_ids.issuperset(ids)

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def _encode(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text, and whether it was truncated."""
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        is_too_long = [len(sequence) > max_length for sequence in ids]
        if any(is_too_long):
            indices = [i for i, too_long in enumerate(is_too_long) if too_long]
            truncated = self.tokenizer([texts[i] for i in indices], truncation=True, max_length=max_length)["input_ids"]
            for i, sequence in zip(indices, truncated, strict=True):
                ids[i] = sequence
        return ids, is_too_long


def settings(tokenize: Tokenize) -> dict[str, Any]:
    """Everything besides the texts that determines their token ids."""
    lengths = {"query_max_length": tokenize.query_max_length, "passage_max_length": tokenize.passage_max_length}
    instructions = {"query": tokenize.query_instruction, "passage": tokenize.passage_instruction}
    return {"stage": "finetune", **lengths, **instructions, "tokenizer": tokenizer_identity(tokenize.tokenizer)}
