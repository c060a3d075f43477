"""Tiny encoders, tokenizers and texts for tests; nothing comes from a hub."""

from __future__ import annotations

import json
import random
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    XLMRobertaConfig,
)

from contrastive.negatives import NegativeMask
from tests import processes

WORDS = [
    "shuffle",
    "rows",
    "tensor",
    "matrix",
    "graph",
    "node",
    "edge",
    "search",
    "vector",
    "index",
    "text",
    "query",
    "passage",
    "rank",
    "loss",
    "mask",
    "token",
    "train",
    "learn",
    "encoder",
    "decoder",
    "gradient",
    "batch",
    "step",
    "model",
    "layer",
    "attention",
    "norm",
    "memory",
    "device",
    "kernel",
    "cache",
    "file",
    "folder",
]
FAMILIES = ("bert", "xlm-roberta", "modernbert")


def texts(count: int, seed: int = 0, longest: int = 24) -> list[str]:
    """Sentences of 3 to `longest` words."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) + rng.choice(["", "s", "ing"]) for _ in range(rng.randint(3, longest)))
        for _ in range(count)
    ]


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """WordPiece for bert, SentencePiece-like unigrams for xlm-roberta, byte-level BPE for modernbert.

    The pieces of the first two are written here: their trainers break ties at random.
    """
    names = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        if family == "xlm-roberta"
        else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    )
    cls, pad, sep, unk, mask = names
    letters, whole = list(string.ascii_lowercase), WORDS[::2]
    halves = [part for word in WORDS[1::2] for part in (word[:4], f"##{word[4:]}") if part != "##"]
    if family == "bert":
        pieces = dict.fromkeys([*names, *letters, *(f"##{c}" for c in letters), *whole, *halves, "##s", "##ing"])
        backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=unk))
        backend.decoder = decoders.WordPiece()  # type: ignore[assignment]
        backend.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    elif family == "xlm-roberta":
        scores = dict.fromkeys(["▁", *letters], -6.0) | {"s": -3.0, "ing": -3.0}
        scores |= {part.removeprefix("##"): -4.0 for part in halves} | {f"▁{word}": -5.0 for word in whole}
        backend = Tokenizer(
            models.Unigram([*((name, 0.0) for name in names), *scores.items()], unk_id=names.index(unk))
        )
        backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    else:
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts(300, seed=7), trainer)
    backend.add_special_tokens(names)
    ends = [(cls, backend.token_to_id(cls)), (sep, backend.token_to_id(sep))]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=ends
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=cls,
        pad_token=pad,
        sep_token=sep,
        unk_token=unk,
        mask_token=mask,
        model_max_length=64,
    )


def encoder(
    folder: Path,
    family: str = "bert",
    *,
    dropout: float = 0.0,
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
    std: float = 0.2,
) -> Path:
    """A masked language model of random weights with its tokenizer, saved as a transformers folder."""
    own_tokenizer = tokenizer(family)
    sizes = {
        "vocab_size": len(own_tokenizer), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "pad_token_id": own_tokenizer.pad_token_id, "initializer_range": std,
    }  # fmt: skip
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config: Any
    if family == "bert":
        config = BertConfig(max_position_embeddings=64, **sizes, **rates)
    elif family == "xlm-roberta":
        config = XLMRobertaConfig(max_position_embeddings=66, **sizes, **rates)
    else:
        rates = {name: dropout for name in ("embedding_dropout", "mlp_dropout", "attention_dropout")}
        ends = {"cls_token_id": own_tokenizer.cls_token_id, "sep_token_id": own_tokenizer.sep_token_id}
        ends |= {"bos_token_id": own_tokenizer.cls_token_id, "eos_token_id": own_tokenizer.sep_token_id}
        config = ModernBertConfig(max_position_embeddings=64, local_attention=16, **sizes, **rates, **ends)
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config)
    model.get_input_embeddings().weight.data *= 5  # texts that differ give vectors that differ, even untrained
    model.save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return folder


def decoder(folder: Path, **options: Any) -> Path:
    """A causal decoder of random weights as a transformers folder; its tokenizer puts no special token at either end.

    options   of its configuration, as is_causal=False
    """
    backend = Tokenizer.from_str(tokenizer("modernbert").backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()  # type: ignore[assignment]
    names = {"eos_token": "[SEP]", "bos_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    own_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=336,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        **options,
    )
    Qwen2Model(config).save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return folder


def with_pooling(folder: Path, **values: Any) -> Path:
    """The folder, which now states its pooling as sentence-transformers does."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(values))
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pretrain_file(path: Path, count: int = 40) -> Path:
    return write_jsonl(path, [{"text": text} for text in texts(count)])


def finetune_file(path: Path, count: int = 40, negatives: int = 2, scores: bool = False) -> Path:
    all_texts = texts(count * (2 + negatives), seed=3)
    rows = []
    for i in range(count):
        query, pos, *neg = all_texts[i * (2 + negatives) : (i + 1) * (2 + negatives)]
        row: dict[str, Any] = {"query": query, "pos": [pos, pos + " again"], "neg": neg}
        if scores:
            row |= {"pos_scores": [0.9, 0.8], "neg_scores": [0.1 * j for j in range(negatives)]}
        rows.append(row)
    return write_jsonl(path, rows)


def trained(folder: Path, plain: Path, *, query_prompt: str = "search ", max_length: int = 32) -> Path:
    """A small BERT of random weights (also in `plain`), CLS pooling, a query prompt; in sentence-transformers' form."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    encoder_folder = plain if plain.exists() else encoder(plain)
    transformer = Transformer(str(encoder_folder), max_seq_length=max_length)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="cls"), Normalize()]
    prompts = {"query": query_prompt, "document": ""}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
    return folder


def beir_folder(folder: Path, count: int = 12) -> Path:
    """Queries that are the first words of their documents."""
    documents = texts(count, seed=11)
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    )
    write_jsonl(
        folder / "queries.jsonl", [{"_id": f"q{i}", "text": " ".join(t.split()[:3])} for i, t in enumerate(documents)]
    )
    (folder / "qrels").mkdir()
    lines = [f"q{i}\td{i}\t1" for i in range(count)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def distinct_texts(queries: int, passages: int, device: str = "cpu") -> NegativeMask:
    """Query i is answered by passage i, and no two texts are equal."""
    place, hashes = torch.arange(queries, device=device), torch.arange(passages, device=device)
    return NegativeMask(
        anchor_B=-1 - place,
        answer_B=place,
        same_query_B=-1 - place,
        candidate_M=hashes,
        owner_M=hashes + passages,
        positive_index_B=place,
        in_row_only=False,
        start_B=place,
        end_B=place,
    )


def build_wheel(folder: Path) -> Path:
    """The wheel of this tree, built in `folder` without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    processes.run(command, limit_s=120).check_returncode()
    (wheel,) = folder.glob("*.whl")
    return wheel


def tokens_of_last_layer(encoder: Any) -> list[int]:
    """Filled from now on, by each pass of a BERT: how many tokens go through the end of its last layer."""
    counts: list[int] = []
    last = encoder.encoder.layer[-1].intermediate
    last.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[:-1].numel()))
    return counts
