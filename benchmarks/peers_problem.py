"""What all packages of `make bench-peers` compute: a small BERT of random weights, and texts of known lengths.

Words and word pieces are made up, so that a text has as many tokens as it should: a word is one piece of five letters,
or that and a second piece of three. Lengths are the quantiles of their distribution, not draws: no batch is lucky.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from tests import tiny

VOCABULARY = 30_522
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_WORDS, NUM_SECOND_PIECES = 24_000, 6_000
SPLIT = 0.25
"""Of the words that have a second piece."""
MAX_TOKENS, QUERY_TOKENS, PASSAGE_TOKENS = 512, 32, 128
NATURAL_MEDIAN, NATURAL_SPREAD = 100, 0.9
"""Tokens of web text, log-normal: the median, and the standard deviation of the logarithm."""


def encoder(folder: Path) -> Path:
    """4 layers of width 256, vocabulary of BERT's size, dropout 0.1; beside it `model`, with pooling."""
    words, pieces = _words()
    names = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *words, *(f"##{piece}" for piece in pieces)]
    names += [f"[unused{i}]" for i in range(VOCABULARY - len(names))]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=MAX_TOKENS,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "mini")
    vocabulary = {name: i for i, name in enumerate(names)}
    BertTokenizer(vocab=vocabulary, model_max_length=MAX_TOKENS).save_pretrained(folder / "mini")
    (folder / "mini/vocab.txt").write_text("\n".join(names) + "\n")  # for older versions of transformers
    tiny.trained(folder / "model", folder / "mini", query_prompt="", max_length=MAX_TOKENS)
    return folder / "mini"


def _words() -> tuple[list[str], list[str]]:
    """Words, and second pieces of words."""
    rng = random.Random(0)

    def draw(letters: int, count: int) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn["".join(rng.choices(LETTERS, k=letters))] = None
        return list(drawn)

    return draw(5, NUM_WORDS), draw(3, NUM_SECOND_PIECES)


class Writer:
    """Texts of made-up words; the same from the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._words, self._pieces = _words()

    def text_of_words(self, count: int) -> str:
        return " ".join(self._word(self._rng.random() < SPLIT) for _ in range(count))

    def text_of_tokens(self, count: int) -> str:
        """`count` tokens, without [CLS] and [SEP]."""
        words: list[str] = []
        while count:
            is_split = count > 1 and self._rng.random() < SPLIT
            words.append(self._word(is_split))
            count -= 1 + is_split
        return " ".join(words)

    def _word(self, is_split: bool) -> str:
        # A square makes some words frequent, as in real texts.
        word = self._words[int(self._rng.random() ** 2 * NUM_WORDS)]
        return word + self._rng.choice(self._pieces) if is_split else word

    def shuffled(self, texts: Sequence[str]) -> list[str]:
        return self._rng.sample(texts, len(texts))


def quantiles(count: int, at: Callable[[float], float]) -> list[int]:
    """`count` lengths, whose distribution has the inverse `at`."""
    return [round(at((i + 0.5) / count)) for i in range(count)]


def natural(fraction: float) -> float:
    """Tokens of a web text, its ends included."""
    length = NATURAL_MEDIAN * 2.718281828 ** (NATURAL_SPREAD * NormalDist().inv_cdf(fraction))
    return min(max(length, 8), MAX_TOKENS)


def log_uniform(least: int, most: int) -> Callable[[float], float]:
    return lambda fraction: least * (most / least) ** fraction


def texts_510(count: int) -> list[str]:
    writer = Writer(1)
    return [writer.text_of_tokens(MAX_TOKENS - 2) for _ in range(count)]


def natural_texts(count: int) -> list[str]:
    writer = Writer(2)
    return writer.shuffled([writer.text_of_tokens(length - 2) for length in quantiles(count, natural)])


def triples(count: int, kind: str) -> list[tuple[str, str, str]]:
    """(query, positive, negative).

    kind   full: passages of 128 tokens; mixed: log-uniformly of 8 to 110 words; short: all texts of 4 to 12 words
    """
    writer = Writer(3)
    longest_query, *limits = {"full": (24,), "mixed": (24, 8, 110), "short": (12, 4, 12)}[kind]
    queries = writer.shuffled([writer.text_of_words(n) for n in quantiles(count, log_uniform(4, longest_query))])
    if not limits:
        passages = [writer.text_of_tokens(PASSAGE_TOKENS - 2) for _ in range(2 * count)]
    else:
        lengths = quantiles(2 * count, log_uniform(*limits))
        passages = writer.shuffled([writer.text_of_words(n) for n in lengths])
    return list(zip(queries, passages[:count], passages[count:], strict=True))
