"""Rows of a query with its passages, and one rank's share of a step's global batch as micro-batches of texts.

Queries and passages go through the encoder together, sorted by length: less padding, the same mathematics.
Shape suffixes: B texts of a micro-batch, L tokens (padded), Q queries, P passages of this rank, G passages of a query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chassis import chance
from chassis.data import Mixture, Order, cut, padded
from chassis.encoder import tokenizer_identity
from chassis.errors import DataError
from chassis.schema import BatchPlan
from contrastive.config import Data

_STRINGS, _SCORES = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("float32"))
ROW_FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "type": datasets.Value("string"),
        "pos": _STRINGS,
        "pos_scores": _SCORES,
        "neg": _STRINGS,
        "neg_scores": _SCORES,
    }
)
_TEXT = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features(
    {
        "query_ids": _TEXT,
        "query_hash": datasets.Value("int64"),
        "pos_ids": datasets.List(_TEXT),
        "pos_hash": datasets.List(datasets.Value("int64")),
        "neg_ids": datasets.List(_TEXT),
        "neg_hash": datasets.List(datasets.Value("int64")),
        "pos_scores": _SCORES,
        "neg_scores": _SCORES,
        "most_negatives": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
    }
)
_UNLIMITED = 2**31 - 1
TYPES = ("normal", "only_1neg", "symmetric_class", "symmetric_sts", "symmetric_clustering")
LENGTH_GROUPS = 4
"""Micro-batches of a step that needs no second pass: cut by length, all their graphs kept."""


# --- rows ------------------------------------------------------------------------------------


def check_row(where: str, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A row of BGE's JSONL or of sentence-transformers' columns in one form; none for an empty query."""
    if row.get("query") is None and row.get("anchor") is not None:  # tables hold all columns in every row
        row = _from_columns(row)
    query = row.get("query")
    if not isinstance(query, str):
        raise DataError(f"{where}: query: must be a text, got {type(query).__name__} (a row has query, pos, neg)")
    kept: dict[str, Any] = {"query": query, "prompt": row.get("prompt"), "type": row.get("type") or "normal"}
    if kept["type"] not in TYPES:
        raise DataError(f"{where}: type: {kept['type']!r} is not known (one of {', '.join(TYPES)})")
    if not isinstance(kept["prompt"], (str, type(None))):
        raise DataError(f"{where}: prompt: must be a text, got {type(kept['prompt']).__name__}")
    for name in ("pos", "neg"):
        texts = row.get(name)
        texts = [] if texts is None and name == "neg" else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {name}: must be a list of texts, got {type(texts).__name__}")
        scores = row.get(f"{name}_scores") or []
        if scores and (not isinstance(scores, list) or len(scores) != len(texts)):
            raise DataError(
                f"{where}: {name}_scores: {len(scores)} scores for {len(texts)} texts (give one for each, or none)"
            )
        if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores):
            raise DataError(f"{where}: {name}_scores: must be numbers")
        full = [i for i, text in enumerate(texts) if text.strip()]
        kept[name] = [texts[i] for i in full]
        kept[f"{name}_scores"] = [float(scores[i]) for i in full] if scores else []
    if not kept["pos"]:
        raise DataError(f"{where}: pos: must hold at least one text")
    return kept if query.strip() else None


def _from_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in row if name == "negative" or name.startswith("negative_")]
    return {
        "query": row["anchor"],
        "pos": [row.get("positive")],
        "neg": [row[name] for name in names if row[name] is not None],
    }


def content_hash(text: str) -> int:
    """63 bits by which equal texts are recognised, whatever instruction stands before them."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Tokenise:
    """Batches of checked rows -> token ids, each text once in its row, with its instruction."""

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
            instruction = self.query_instruction if prompt is None else prompt
            queries.append(instruction + query)
            symmetric = kind in ("symmetric_sts", "symmetric_clustering")
            before = instruction if symmetric else self.passage_instruction
            passages += [before + text for text in (*pos, *neg)]
        query_ids, query_cut = self._encode(queries, self.query_max_length)
        passage_ids, passage_cut = self._encode(passages, self.passage_max_length)
        at = 0
        for i, query in enumerate(columns["query"]):
            pos, neg, kind = columns["pos"][i], columns["neg"][i], columns["type"][i]
            end = at + len(pos) + len(neg)
            values = {
                "query_ids": query_ids[i],
                "query_hash": content_hash(query),
                "pos_ids": passage_ids[at : at + len(pos)],
                "pos_hash": [content_hash(text) for text in pos],
                "neg_ids": passage_ids[at + len(pos) : end],
                "neg_hash": [content_hash(text) for text in neg],
                "pos_scores": columns["pos_scores"][i],
                "neg_scores": columns["neg_scores"][i],
                "most_negatives": {"only_1neg": 1, "symmetric_class": len(neg)}.get(kind, _UNLIMITED),
                "tokens": len(query_ids[i]) + sum(map(len, passage_ids[at:end])),
                "truncated": query_cut[i] or any(passage_cut[at:end]),
            }
            for name, value in values.items():
                rows[name].append(value)
            at = end
        return rows

    def _encode(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        cut_off = [len(row) > max_length for row in ids]
        if any(cut_off):
            longer = [i for i, flag in enumerate(cut_off) if flag]
            again = self.tokenizer([texts[i] for i in longer], truncation=True, max_length=max_length)["input_ids"]
            for i, row in zip(longer, again, strict=True):
                ids[i] = row
        return ids, cut_off


def settings(data: Data, tokenise: Tokenise) -> dict[str, Any]:
    """Everything besides the texts that decides what tokenising makes of them."""
    lengths = {"query_max_length": tokenise.query_max_length, "passage_max_length": tokenise.passage_max_length}
    instructions = {"query": data.query_instruction, "passage": data.passage_instruction}
    return {"stage": "finetune", **lengths, **instructions, "tokenizer": tokenizer_identity(tokenise.tokenizer)}


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    ids_BL: Tensor
    lengths_B: Tensor
    real: bool
    """False where its text only fills an empty place."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """In the order of Tower.forward."""
        return [self.ids_BL.to(device, non_blocking=True), self.lengths_B.to(device, non_blocking=True)]

    def pin_memory(self) -> MicroBatch:
        return MicroBatch(self.ids_BL.pin_memory(), self.lengths_B.pin_memory(), self.real)


@dataclass(frozen=True)
class StepBatch:
    """This rank's queries and passages of one step; texts are numbered queries first, then passages."""

    micro_batches: list[MicroBatch]
    place_N: Tensor
    """Where the texts of all micro-batches, one after another, belong."""
    query_hash_Q: Tensor
    passage_hash_P: Tensor
    owner_P: Tensor
    """The query hash where a passage is that query's positive, else -1."""
    start_Q: Tensor
    """Each query's first passage, its positive, among this rank's passages."""
    count_Q: Tensor
    """How many passages each query brought."""
    teacher_QG: Tensor
    """Scores of each query's own passages; NaN where there are none."""
    alone: bool
    """Whether queries see only the passages that they brought."""
    single_pass: bool
    rows: int
    tokens: int
    padded_tokens: int

    def pin_memory(self) -> StepBatch:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return StepBatch(**{**values, "micro_batches": [m.pin_memory() for m in self.micro_batches]})


@dataclass(frozen=True)
class DataSet:
    """One entry of data.train: each batch is of one of them."""

    table: datasets.Dataset
    order: Order
    in_batch_negatives: bool


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    sets: Sequence[DataSet]
    mixture: Mixture
    plan: BatchPlan
    rank: int
    seed: int
    negatives: int
    pad_id: int

    def __call__(self, step: int) -> StepBatch:
        which, number = self.mixture.at(step)
        chosen = self.sets[which]
        part = self.plan.rows(self.rank)
        epochs, numbers = chosen.order.batch(number, part if len(part) else range(0, 1))
        rows = chosen.table[numbers.tolist()]
        drawn = self._draw(rows, epochs, numbers)
        if not len(part):  # a rank without a query takes part with a text that does not count
            return self._batch([], [], rows["query_ids"], chosen)
        groups = [[(rows[f"{name}_ids"][i][j], rows[f"{name}_hash"][i][j], _score(rows, name, i, j)) for name, j in own]
                  for i, own in enumerate(drawn)]  # fmt: skip
        queries = list(zip(rows["query_ids"], rows["query_hash"], strict=True))
        return self._batch(queries, groups, rows["query_ids"], chosen)

    def _draw(self, rows: Mapping[str, list[Any]], epochs: Tensor, numbers: Tensor) -> list[list[tuple[str, int]]]:
        """For each row its passages as (pos | neg, index): one positive, then the negatives."""
        held_Q = torch.tensor([len(pos) for pos in rows["pos_ids"]])
        keys_Q = chance.hashed(torch.tensor(chance.key(self.seed, "passages")), epochs, numbers)
        positive_Q = chance.below(held_Q, keys_Q, 0).tolist()
        most = max(len(neg) for neg in rows["neg_ids"])
        order_QN = chance.hashed(keys_Q[:, None], 1, torch.arange(most))
        drawn = []
        for i, positive in enumerate(positive_Q):
            have = len(rows["neg_ids"][i])
            want = min(self.negatives, rows["most_negatives"][i]) if have else 0
            order = order_QN[i, :have].argsort().tolist()
            drawn.append([("pos", positive), *(("neg", order[j % have]) for j in range(want))])
        return drawn

    def _batch(self, queries: list[Any], groups: list[Any], filler: list[Any], chosen: DataSet) -> StepBatch:
        passages = [passage for group in groups for passage in group]
        texts = [ids for ids, _ in queries] + [ids for ids, _, _ in passages]
        widest = max(map(len, groups), default=1)
        starts = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)[:-1]
        owners = [queries[i][1] if j == 0 else -1 for i, group in enumerate(groups) for j in range(len(group))]
        teacher = torch.full((len(groups), widest), float("nan"))
        for i, group in enumerate(groups):
            if all(score is not None for _, _, score in group):
                teacher[i, : len(group)] = torch.tensor([score for _, _, score in group])
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        micro_batches = [self._micro_batch([texts[i] for i in run], filler[:1]) for run in cut(by_length, self._parts)]
        return StepBatch(
            micro_batches,
            place_N=torch.tensor(by_length, dtype=torch.int64),
            query_hash_Q=torch.tensor([found for _, found in queries], dtype=torch.int64),
            passage_hash_P=torch.tensor([found for _, found, _ in passages], dtype=torch.int64),
            owner_P=torch.tensor(owners, dtype=torch.int64),
            start_Q=starts[: len(groups)],
            count_Q=torch.tensor([len(group) for group in groups], dtype=torch.int64),
            teacher_QG=teacher,
            alone=not chosen.in_batch_negatives,
            single_pass=self.plan.passes == 1,
            rows=len(queries),
            tokens=sum(map(len, texts)),
            padded_tokens=sum(m.ids_BL.numel() for m in micro_batches),
        )

    @property
    def _parts(self) -> int:
        """Micro-batches of a step, the same on all ranks."""
        if self.plan.passes > 1:
            return self.plan.passes
        most = max(self.plan.rows_per_rank) * (2 + self.negatives)
        return LENGTH_GROUPS if most >= 8 * LENGTH_GROUPS else 1

    def _micro_batch(self, texts: list[Any], filler: list[Any]) -> MicroBatch:
        rows = texts or filler
        return MicroBatch(padded(rows, self.pad_id), torch.tensor([len(row) for row in rows]), bool(texts))


def _score(rows: Mapping[str, list[Any]], name: str, row: int, passage: int) -> float | None:
    scores = rows[f"{name}_scores"][row]
    return scores[passage] if scores else None
