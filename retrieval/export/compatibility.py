"""Whether models can be merged: the tensors that their files hold, and the settings that must agree.

Loads without torch until there are settings to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lodestar.errors import ModelError, first_line, naming
from lodestar.models.weight_files import FETCH, TensorHeader, read_headers
from retrieval.embedding.model_folder import check_folder

NEUTRAL_FIELDS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "id2label",
    "label2id", "problem_type", "gradient_checkpointing",
}  # fmt: skip
"""Fields of config.json that change no embedding; nor do dropout rates and names that begin with an underscore."""
REMEDY = "merge only models that were trained from one model"


def is_averaged(header: TensorHeader) -> bool:
    """Not integers, as positions, nor the pooler, which [CLS] does not need: they stay the first model's."""
    return header.dtype.startswith(("F", "BF")) and not header.name.startswith("pooler.")


Headers = dict[str, TensorHeader]
"""By tensor name with the module's subfolder before it; the names of files may differ between models."""


def check_mergeable(folders: Sequence[Path]) -> list[Headers]:
    """The tensors of each folder, by the headers of its files.

    Raises ModelError, naming what differs, if a folder does not hold the first one's architecture and vocabulary, and
    for a folder that is damaged or holds NaN.
    """
    headers = check_tensors(folders)
    with naming("models"):
        settings = [_settings(folder) for folder in folders]
        for i in range(1, len(folders)):
            _compare_settings(folders[0], settings[0], folders[i], settings[i])
    return headers


def check_tensors(folders: Sequence[Path]) -> list[Headers]:
    """As `check_mergeable`, without the settings; loads without torch."""
    with naming("models"):
        headers = [read_folder(folder) for folder in folders]
        for folder, others in zip(folders[1:], headers[1:], strict=True):
            _compare_tensors(folders[0], headers[0], folder, others)
    for folder in folders:
        check_folder(folder, "models", finite=True)
    return headers


def _compare_tensors(first: Path, first_headers: Headers, other: Path, other_headers: Headers) -> None:
    for name in sorted(first_headers.keys() | other_headers.keys()):
        a, b = first_headers.get(name), other_headers.get(name)
        if a and b and (a.shape, is_averaged(a)) != (b.shape, is_averaged(b)):
            difference = f"is {b.dtype} {b.shape}, but {a.dtype} {a.shape} in {first}"
            raise ModelError(f"{other}: {name}: {difference} ({REMEDY})")
        if a and not b and is_averaged(a):
            raise ModelError(f"{other}: {name}: is missing, but in {first} ({REMEDY})")
        if b and not a and is_averaged(b):
            raise ModelError(f"{first}: {name}: is missing, but in {other} ({REMEDY})")


def _compare_settings(
    first: Path, first_settings: Mapping[str, object], other: Path, other_settings: Mapping[str, object]
) -> None:
    for name in sorted(first_settings.keys() | other_settings.keys()):
        a, b = first_settings.get(name), other_settings.get(name)
        if a != b:
            raise ModelError(f"{other}: {name}: is {b!r}, but {a!r} in {first} ({REMEDY})")


def read_folder(folder: Path) -> Headers:
    """ModelError for a folder that is not in sentence-transformers' format, or whose files cannot be read."""
    if not (folder / "modules.json").is_file():
        problem = "no modules.json there" if folder.is_dir() else "no such folder"
        raise ModelError(f"{folder}: {problem} (name a sentence-transformers folder, as model/ of a run)")
    headers = {
        (file.parent.relative_to(folder) / name).as_posix(): header
        for file in sorted(folder.rglob("*.safetensors"))
        for name, header in read_headers(file).items()
    }
    if not headers:
        check_folder(folder, "models")  # tells of pickle
        raise ModelError(f"{folder}: holds no *.safetensors (open it with sentence-transformers and save it once)")
    return headers


def _settings(folder: Path) -> dict[str, object]:
    """What must be equal besides the tensors, each under the name that an error gives it."""
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vocabulary, letter_ids = tokenizer.get_vocab(), tokenizer("a")["input_ids"]
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        types = [module["type"].rpartition(".")[2] for module in modules]
        subfolders = [module["path"] for module, type_ in zip(modules, types, strict=True) if type_ == "Pooling"]
        pooling = [Pooling.load_config(str(folder), subfolder=name)["pooling_mode"] for name in subfolders]
    except Exception as error:  # each family checks its own values
        raise ModelError(f"{folder}: cannot be opened: {first_line(error)} ({FETCH})") from None
    fields = {
        name: value
        for name, value in config.items()
        if name not in NEUTRAL_FIELDS and not name.startswith("_") and "dropout" not in name
    }
    tokens = {f"vocabulary: {token!r}": token_id for token, token_id in vocabulary.items()}
    return {**fields, **tokens, "token ids of 'a'": letter_ids, "modules": types, "pooling": pooling}
