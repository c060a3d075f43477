"""The demo's data: docstrings of a fixed list of packages, a tokenizer of their words, and a small encoder of chance.

    python -m examples.docstrings --output runs/demo/data

Source files are read by `ast`; nothing is imported or executed. A docstring's summary is a query, the rest its passage.
The packages of HELD_OUT are kept from all training, the tokenizer's too, and become a test collection.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from string import punctuation
from typing import Any

HELD_OUT = ("networkx", "sklearn", "sentence_transformers")
TRAINED_ON = (
    "torch", "sympy", "scipy", "pandas", "matplotlib", "numpy", "narwhals", "deepspeed", "datasets", "huggingface_hub",
    "accelerate", "pydantic", "pygments", "rich", "PIL", "fsspec", "jinja2", "click", "joblib",
)  # fmt: skip
"""Packages of requirements-demo.lock, so that the demo's data do not depend on what else is installed. Without
transformers, whose models repeat each other's docstrings."""
SHORTEST_TEXT = 120
"""Characters; shorter docstrings say little."""
SHORTEST_PASSAGE = 40
"""Characters."""
LONGEST_NAME = 40
"""Characters; longer strings in a call that registers documentation are the documentation."""
ALPHABET = 100
"""Letters and signs that the tokenizer knows; others are [UNK]."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SKIPPED = {"test", "tests", "_vendor"}
_REGISTERED = {"add_docstr", "add_newdoc"}  # how torch, numpy and scipy document what is written in C


Show = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Docstring:
    """A text of over SHORTEST_TEXT characters, and the full name of what it describes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return self.name.partition(".")[0] in HELD_OUT


# --- collecting ------------------------------------------------------------------------------


def package_files(packages: Sequence[str] = (*TRAINED_ON, *HELD_OUT)) -> list[tuple[str, Path]]:
    """(module, file) of each source file of installed packages; SystemExit names one that is not installed."""
    files = []
    for package in packages:
        spec = importlib.util.find_spec(package)  # of a package at the top, so nothing is imported
        if spec is None or spec.origin is None:
            raise SystemExit(f"error: the package {package} is not installed (run: make install)")
        files += source_files(Path(spec.origin).parent.parent, package)
    return sorted(files)


@dataclass(frozen=True)
class Collected:
    docstrings: list[Docstring]
    """Sorted by name, each text once."""
    files: int
    broken: int
    """Files that could not be read or parsed."""
    repeated: int
    """Docstrings left out because their text was there already."""
    shared: int
    """Of those, the ones of training packages whose text is a held-out package's too."""


def collect(
    files: Sequence[tuple[str, Path]], *, processes: int = 0, show: Show = lambda it, total: it
) -> Collected:
    """The docstrings of `files`, (module, file) each.

    The result is the same whatever `processes` (0: one for each core) and wherever the packages lie.
    show    wraps the batches of files, whose number it is told, in a progress bar
    """
    batches = [files[start : start + 50] for start in range(0, len(files), 50)]
    processes = processes or os.cpu_count() or 1
    found: list[Docstring] = []
    broken = 0
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        for docstrings, failures in show((pool.map if pool else map)(_read_batch, batches), len(batches)):
            found += docstrings
            broken += failures
    kept: dict[str, Docstring] = {}
    shared = 0
    for docstring in sorted(found, key=lambda d: (not d.held_out, d.name, d.text)):
        first = kept.setdefault(_essence(docstring.text), docstring)  # held-out packages first: they keep the text
        shared += first.held_out and not docstring.held_out
    docstrings = sorted(kept.values(), key=lambda d: (d.name, d.text))
    return Collected(docstrings, len(files), broken, len(found) - len(kept), shared)


def source_files(root: Path, package: str = ".") -> Iterator[tuple[str, Path]]:
    """(module, file) of each source file of a package below `root`, tests left out; by default of all packages."""
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED.intersection(parts):
            yield ".".join(parts).removesuffix(".__init__"), path


def _read_batch(files: Sequence[tuple[str, Path]]) -> tuple[list[Docstring], int]:
    found: list[Docstring] = []
    broken = 0
    gc.disable()  # syntax trees hold no cycles, and looking for them takes a third of the time
    for module, path in files:
        try:
            source = path.read_bytes()
            if b'"""' not in source and b"'''" not in source:
                continue  # twice as fast as parsing all of them
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)  # its name for "\d" before Python 3.12
                tree = ast.parse(source)
            found += [d for d in _docstrings(module, tree) if len(d.text) > SHORTEST_TEXT]
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            broken += 1
    gc.enable()
    return found, broken


def _docstrings(name: str, node: ast.AST) -> Iterator[Docstring]:
    """Of a module, class or function and of what its body defines, also below `if` and `try`."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield Docstring(name, _encodable(text))
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(f"{name}.{child.name}", child)
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _docstrings(name, child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _registered(name, child.value)


def _registered(module: str, call: ast.Call) -> Iterator[Docstring]:
    """The text of `add_docstr(torch.abs, "...".format(...))` and its like, under the name of what it describes."""
    if getattr(call.func, "id", getattr(call.func, "attr", None)) not in _REGISTERED or len(call.args) < 2:
        return
    *about, last = call.args
    constants = [part for part in ast.walk(last) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    strings = [str(part.value) for part in sorted(constants, key=lambda part: (part.lineno, part.col_offset))]
    text = inspect.cleandoc("".join(string for string in strings if len(string) > LONGEST_NAME))
    text = re.sub(r"(?m)^\s*\{\w+\}\s*\n?", "", text).replace("{{", "{").replace("}}", "}")  # filled in at run time
    names = [ast.unparse(part).strip("'\"") for part in about] + [s for s in strings if len(s) <= LONGEST_NAME][:1]
    package = module.partition(".")[0]
    yield Docstring(".".join(names if names[0].partition(".")[0] == package else [package, *names]), _encodable(text))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "ignore").decode("utf-8")  # an escape may stand for half a character


def _essence(text: str) -> str:
    """What must be equal for two texts to count as the same: all but spaces and case."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).hexdigest()


# --- queries and passages --------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[\w)\]`'\"][.?!])\s+(?=[A-Z`:*\"'(\[])")
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)(\s*->.*)?", re.DOTALL)
_NO_SUMMARY = re.compile(r"(>>>|\.\.|:\w+|@|[-=*#+|]{2}|\w+ \(`)")  # code, a directive, a rule, an argument
_SECTION = re.compile(r"\s*(\w+ ?\w*:|[-=~^*]{3,})\s*")


def split(text: str) -> tuple[str, str] | None:
    """(query, passage): the first sentence and what follows it; none if one of them is missing or holds the other."""
    head, _, rest = text.partition("\n\n")
    if _SIGNATURE.fullmatch(head.strip()):
        head, _, rest = rest.strip().partition("\n\n")
    lines = head.splitlines()
    at = next((i for i, line in enumerate(lines) if _SECTION.fullmatch(line)), len(lines))
    if at < len(lines) and not lines[at].strip().endswith(":"):
        at = max(0, at - 1)  # an underlined heading begins a line earlier
    summary, rest = " ".join(" ".join(lines[:at]).split()), "\n".join([*lines[at:], "", rest]).strip()
    end = _SENTENCE_END.search(summary)
    query = summary[: end.start()] if end else summary
    passage = (summary[end.end() :] + "\n\n" + rest if end else rest).strip()
    words = re.findall(r"[^\W\d_]{2,}", query)
    if len(words) < 3 or len(query) > 300 or _NO_SUMMARY.match(query) or len(passage) < SHORTEST_PASSAGE:
        return None
    bare = query.rstrip(".?!").lower()
    return None if bare in " ".join(passage.lower().split()) else (query, passage)


# --- the corpus ------------------------------------------------------------------------------


def write_corpus(docstrings: Sequence[Docstring], output: Path) -> dict[str, Any]:
    """Write pretrain.jsonl, finetune.jsonl, heldout/ and library/ below `output`; returns the counts.

    pretrain.jsonl   {"text"}, whole docstrings of the training packages
    finetune.jsonl   BGE rows {"query", "pos", "neg"}: docstrings with one summary are the positives of one row
    heldout/         the held-out packages in BEIR's layout; equal passages are one document, equal queries one query
    library/         all packages as one corpus.jsonl, whole docstrings, to search in
    """
    tested = [d for d in docstrings if d.held_out]
    pairs = {d.name + d.text: split(d.text) for d in docstrings}
    forbidden = {_essence(d.text) for d in tested}
    forbidden |= {_essence(pair[1]) for d in tested if (pair := pairs[d.name + d.text])}
    trained: list[Docstring] = []
    positives: dict[str, dict[str, None]] = defaultdict(dict)
    for docstring in (d for d in docstrings if not d.held_out):
        pair = pairs[docstring.name + docstring.text]
        if _essence(docstring.text) in forbidden or (pair and _essence(pair[1]) in forbidden):
            continue
        trained.append(docstring)
        if pair:
            positives[pair[0]].setdefault(pair[1])
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "pretrain.jsonl", ({"text": d.text} for d in trained))
    _write(output / "finetune.jsonl", ({"query": q, "pos": list(p), "neg": []} for q, p in positives.items()))
    (output / "library").mkdir(exist_ok=True)
    library = zip(_identifiers(docstrings), docstrings, strict=True)
    _write(output / "library" / "corpus.jsonl", ({"_id": name, "title": "", "text": d.text} for name, d in library))
    return {
        "docstrings": len(docstrings),
        "training_texts": len(trained),
        "training_pairs": len(positives),
        "passages_shared_with_heldout": len(docstrings) - len(tested) - len(trained),
        **_write_heldout(tested, [pairs[d.name + d.text] for d in tested], output / "heldout"),
        "packages": dict(Counter(d.name.partition(".")[0] for d in trained).most_common(20)),
    }


def _write_heldout(
    tested: Sequence[Docstring], pairs: Sequence[tuple[str, str] | None], folder: Path
) -> dict[str, int]:
    """Every passage is a document, also where the docstring makes no query."""
    documents: dict[str, tuple[str, str]] = {}  # by essence: id, text
    answers: dict[str, dict[str, None]] = defaultdict(dict)  # by query: ids
    for name, docstring, pair in zip(_identifiers(tested), tested, pairs, strict=True):
        query, passage = pair or ("", docstring.text)
        identifier, _ = documents.setdefault(_essence(passage), (name, passage))
        if query:
            answers[query].setdefault(identifier)
    queries = {f"q{number}": query for number, query in enumerate(answers, 1)}
    judged = [f"{key}\t{document}\t1" for key, query in queries.items() for document in answers[query]]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write(folder / "corpus.jsonl", ({"_id": i, "title": "", "text": text} for i, text in documents.values()))
    _write(folder / "queries.jsonl", ({"_id": key, "text": query} for key, query in queries.items()))
    table = "\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n"
    (folder / "qrels" / "test.tsv").write_text(table, encoding="utf-8")
    return {"heldout_passages": len(documents), "heldout_queries": len(queries), "heldout_judgements": len(judged)}


def _identifiers(docstrings: Sequence[Docstring]) -> list[str]:
    """Names, numbered from the second on where several texts have one (a property's getter and setter)."""
    seen: Counter[str] = Counter()
    identifiers = []
    for docstring in docstrings:
        seen[docstring.name] += 1
        number = seen[docstring.name]
        identifiers.append(docstring.name if number == 1 else f"{docstring.name}#{number}")
    return identifiers


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line)["text"] for line in file)


# --- tokenizer and encoder -------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocabulary: int = 4000, max_length: int = 128) -> int:
    """A lower-case WordPiece tokenizer of BERT's kind, as a transformers folder; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    texts = [text[:500] for text in texts]  # further than the demo's encoder reads
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(learner.normalizer.normalize_str(text))
    letters = sorted(sorted(counts.keys() - set(" ")), key=lambda letter: -counts[letter])[:ALPHABET]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        # left alone, the trainer breaks ties between rare letters, and numbers those within words, by chance
        special_tokens=[*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters if letter not in punctuation)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = dict(sorted(learner.get_vocab().items(), key=lambda item: item[1]))
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_encoder(folder: Path, *, seed: int = 42, max_length: int = 128) -> int:
    """A two-layer BERT of random weights, with its MLM head, beside the tokenizer in `folder`; returns its parameters.

    It opens with transformers and, as the [CLS] vector, with sentence-transformers.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from lodestar.models.save import save_model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # at BERT's 0.02 so small an encoder learns nothing for the first minutes
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    card = "# A small encoder of random weights\n\nIts tokenizer is trained; the rest is not.\n"
    save_model(model, tokenizer, folder, weights=None, max_length=max_length, prompts={}, card=card)
    return sum(parameter.numel() for parameter in model.parameters())


# --- the command -----------------------------------------------------------------------------


def build_data(output: Path, *, processes: int = 0, show: Show = lambda it, total: it) -> dict[str, Any]:
    """Collect and write everything below `output`, summary.json last; returns the summary."""
    start = time.perf_counter()
    found = collect(package_files(), processes=processes, show=show)
    summary: dict[str, Any] = {
        "files": found.files,
        "broken_files": found.broken,
        "repeated_texts": found.repeated,
        "texts_shared_with_heldout": found.shared,
        **write_corpus(found.docstrings, output),
    }
    summary["seconds"] = round(time.perf_counter() - start, 1)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def build_encoder(data: Path, folder: Path) -> dict[str, Any]:
    """Tokenizer and encoder from data/pretrain.jsonl into `folder`, whole or absent; returns their sizes."""
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    vocabulary = train_tokenizer(_texts(data / "pretrain.jsonl"), tmp)
    parameters = make_encoder(tmp)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    return {"vocabulary": vocabulary, "parameters": parameters}


def main() -> None:
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo/data"), help="folder of the data")
    parser.add_argument("--encoder", type=Path, help="also train a tokenizer and make a small encoder, in this folder")
    parser.add_argument("--processes", type=int, default=0, help="0: one for each core")
    options = parser.parse_args()
    build_data(options.output, processes=options.processes, show=lambda it, n: tqdm(it, "reading", n, unit="batch"))
    if options.encoder:
        build_encoder(options.output, options.encoder)
    print(f"{options.output}: what was found stands in summary.json")


if __name__ == "__main__":
    main()
