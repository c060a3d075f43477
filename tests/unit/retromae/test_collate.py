"""Texts to ids and words, and the masks of a step, for each kind of tokenizer."""

from __future__ import annotations

import random
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lodestar.config.schema import BatchPlan
from lodestar.data.sampler import ShuffledSampler
from lodestar.errors import DataError
from retromae.collate import INPUTS, Collate, EncodedText, StepBatch, ordinary_ids
from retromae.masks import IGNORED, decoder_visibility
from retromae.text_check import TextCheck
from retromae.tokenization import Tokenize
from tests import tiny

TEXTS = tiny.texts(60, seed=9)
LONG = tiny.texts(60, seed=9, longest=90)  # in short texts rounding to whole tokens would change a ratio of 0.3


def rows_of(family: str, texts: list[str], *, max_length: int = 512, split: bool = False) -> dict[str, list[Any]]:
    return Tokenize(tiny.tokenizer(family), max_length=max_length, split=split)({"text": texts})


class InMemory:
    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def lengths(self, epochs: torch.Tensor, rows: torch.Tensor) -> Any:
        return np.array([len(self.columns["input_ids"][i]) for i in rows.tolist()])

    def __call__(self, epochs: torch.Tensor, rows: torch.Tensor) -> list[EncodedText]:
        return [EncodedText(self.columns["input_ids"][i], self.columns["words"][i]) for i in rows.tolist()]


def step(
    family: str, rank: int = 0, size: int = 1, number: int = 0, micro_size: int = 60, texts: list[str] = TEXTS
) -> StepBatch:
    plan = BatchPlan(len(texts), size, micro_size)
    in_memory = InMemory(rows_of(family, texts))
    return Collate(in_memory, ShuffledSampler(len(texts), len(texts), 3), plan, rank, 3, tiny.tokenizer(family), 0.3)(
        number
    )


def micro_batches(batch: StepBatch) -> list[SimpleNamespace]:
    """The inputs of each micro-batch by name, and the encoder's labels where they stand."""
    found = []
    for i in range(batch.num_micro_batches):
        of_batch = SimpleNamespace(**dict(zip(INPUTS, batch.inputs(i), strict=False)))
        of_batch.labels = torch.full_like(of_batch.masked_input_ids, IGNORED)
        of_batch.labels.flatten()[of_batch.encoder_index] = of_batch.encoder_target
        found.append(of_batch)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_ids_are_the_tokenizers_and_words_are_whole(family: str) -> None:
    tokenizer = tiny.tokenizer(family)
    columns = rows_of(family, TEXTS)
    for text, ids, words in zip(TEXTS, columns["input_ids"], columns["words"], strict=True):
        assert ids == tokenizer(text)["input_ids"]
        assert words[0] == words[-1] == -1 and max(words) == len(text.split()) - 1
        for word, word_text in enumerate(text.split()):
            pieces = [i for i, w in zip(ids, words, strict=True) if w == word]
            assert tokenizer.decode(pieces).strip() == word_text


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_mask_ratios_are_those_of_the_recipe(family: str) -> None:
    """Within 1 % over a corpus, whole words, special tokens never; for encoder and decoder."""
    num_labels = num_hidden = num_ordinary = num_inner = 0
    for number in range(16):
        (batch,) = micro_batches(step(family, number=number, texts=LONG[:31]))
        words, labelled = batch.words, batch.labels != IGNORED
        assert not labelled[words < 0].any()
        assert batch.labels[labelled].equal(batch.input_ids[labelled])
        num_labels, num_ordinary = num_labels + int(labelled.sum()), num_ordinary + int((words >= 0).sum())
        attention_mask = decoder_visibility(words, batch.lengths, batch.rng_key, 0.5, 0)[:, 0]
        for text, length in enumerate(batch.lengths.tolist()):
            rows = torch.arange(1, length - 1)
            is_hidden = ~attention_mask[text, rows][:, rows] & ~torch.eye(len(rows), dtype=torch.bool)
            num_hidden, num_inner = num_hidden + int(is_hidden.sum()), num_inner + len(rows) * (len(rows) - 1)
            for word in words[text][words[text] >= 0].unique():
                of_word = labelled[text][words[text] == word]
                assert of_word.all() or not of_word.any()
    assert abs(num_labels / num_ordinary - 0.3) < 0.01
    assert abs(num_hidden / num_inner - 0.5) < 0.01


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_text_has_the_same_masks_on_any_rank_in_any_micro_batch(size: int) -> None:
    def texts(batch: StepBatch) -> set[tuple[Any, ...]]:
        masked_texts = set()
        for of_batch in micro_batches(batch):
            for masked, clean, length, key in zip(
                of_batch.masked_input_ids, of_batch.input_ids, of_batch.lengths, of_batch.rng_key, strict=True
            ):
                masked_texts.add((tuple(masked[:length].tolist()), tuple(clean[:length].tolist()), int(key)))
        return masked_texts

    whole = step("bert")
    parts = [step("bert", rank, size, micro_size=4) for rank in range(size)]
    assert set().union(*map(texts, parts)) == texts(whole)
    assert len({part.num_micro_batches for part in parts}) == 1
    for name in whole.label_counts:
        assert sum(part.label_counts[name] for part in parts) == whole.label_counts[name] > 0
    for name in ("examples", "tokens"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    assert sum(part.padded_tokens for part in parts) < whole.padded_tokens  # sorted by length: less padding


def test_another_step_draws_other_masks() -> None:
    first, second = (step("bert", number=number).inputs(0)[4].sort().values for number in (0, 1))
    assert not first.equal(second)


def test_a_rank_without_a_text_runs_on_a_filler() -> None:
    batches = [step("bert", rank, 3, texts=TEXTS[:2]) for rank in range(3)]
    assert sorted(batch.examples for batch in batches) == [0, 1, 1]
    (idle,) = [batch for batch in batches if not batch.examples]
    assert (idle.tokens, *idle.label_counts.values()) == (0, 0, 0, 0)
    (filler,) = micro_batches(idle)
    assert len(filler.encoder_index) == len(filler.decoder_index) == 0 and (filler.words == -1).all()


def test_long_texts_are_cut_and_counted_or_split_without_loss() -> None:
    text = " ".join(TEXTS[:5])
    whole = rows_of("bert", [text], max_length=512)["input_ids"][0]
    cut = rows_of("bert", [text], max_length=16)
    assert cut["input_ids"] == [[*whole[:15], whole[-1]]] and cut["truncated"] == [True]
    parts = rows_of("bert", [text], max_length=16, split=True)
    assert [token for ids in parts["input_ids"] for token in ids[1:-1]] == whole[1:-1]
    assert all(len(ids) <= 16 for ids in parts["input_ids"]) and not any(parts["truncated"])
    assert all(min(w for w in words if w >= 0) == 0 for words in parts["words"])


def test_unknown_words_are_masked_and_hidden_as_often_as_others() -> None:
    """In a text of which half is [UNK]; every word is one token."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice([rng.choice(tiny.WORDS[::2]), "☃"]) for _ in range(90)) for _ in range(60)]
    num_tokens, num_labels, num_hidden = (dict.fromkeys(("unknown", "other"), 0) for _ in range(3))
    for batch in chain(*(micro_batches(step("bert", number=number, texts=texts)) for number in range(4))):
        attention_mask = decoder_visibility(batch.words, batch.lengths, batch.rng_key, 0.5, 256)[:, 0]
        is_unknown = batch.input_ids == tiny.tokenizer("bert").unk_token_id
        for name, chosen in (("unknown", is_unknown), ("other", ~is_unknown & (batch.words >= 0))):
            num_tokens[name] += int(chosen.sum())
            num_labels[name] += int((batch.labels[chosen] == batch.input_ids[chosen]).sum())
            num_hidden[name] += int((~attention_mask[:, 1] & chosen).sum())
    assert num_tokens["unknown"] / sum(num_tokens.values()) == pytest.approx(0.5, abs=0.02)
    for name, count in num_tokens.items():  # some 10,800 tokens: four standard deviations are below 0.02
        assert num_labels[name] / count == pytest.approx(0.3, abs=0.02)
        assert num_hidden[name] / count == pytest.approx(0.5, abs=0.02)


def test_an_unknown_word_is_a_word_of_its_own_and_an_unknown_piece_belongs_to_its_word() -> None:
    """A piece with ## never joins [UNK]: WordPiece makes a word [UNK] as a whole."""
    assert rows_of("bert", ["rows ☃ ☃ rows☃ indexes"])["words"] == [[-1, 0, 1, 2, 3, 4, 4, 4, 4, -1]]
    columns = rows_of("xlm-roberta", ["rows☃rows rows"])
    assert columns["input_ids"][0][3] == tiny.tokenizer("xlm-roberta").unk_token_id
    assert columns["words"] == [[-1, 0, 0, 0, 0, 1, 1, -1]]


def test_the_vocabulary_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        calls.append(tokenizer)
        return ordinary_ids(tokenizer)

    monkeypatch.setattr("retromae.collate.ordinary_ids", counted)
    in_memory, plan = InMemory(rows_of("bert", TEXTS)), BatchPlan(60, 1, 4)
    collate = Collate(in_memory, ShuffledSampler(60, 60, 3), plan, 0, 3, tiny.tokenizer("bert"), 0.3)
    assert sum(collate(number).num_micro_batches for number in range(2)) == 30 and len(calls) == 1


def test_a_special_token_spelt_out_in_a_text_is_no_word() -> None:
    columns = rows_of("bert", ["shuffle [MASK] rows"])
    index = columns["input_ids"][0].index(tiny.tokenizer("bert").mask_token_id)
    assert columns["words"][0][index] == -1


def test_a_row_without_a_text_is_named_and_an_empty_one_dropped() -> None:
    accept = TextCheck("text")
    assert accept("f:1", {"text": " a "}) == {"text": " a "} and accept("f:1", {"text": " "}) is None
    with pytest.raises(DataError, match=r"f:2: text: must be a text, got NoneType \(set data\.field; here: body\)"):
        accept("f:2", {"body": "a"})
