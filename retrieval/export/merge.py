"""Several models of one architecture as one: the weighted mean of their weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from lodestar.cli import entry_point
from lodestar.config.loader import Section
from lodestar.distributed.runtime import Placement
from lodestar.errors import ModelError
from lodestar.files import check_absent, make_folder
from retrieval.export.onnx import alone

if TYPE_CHECKING:
    from torch import Tensor

LEFT_BEHIND = ("*.safetensors", "*.bin", "*.onnx*", "onnx", "openvino", ".*", "README.md")
"""What is not copied from the first model's folder: weights in any form, and what was said of it."""
NO_MATTER = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "id2label",
    "label2id", "problem_type", "gradient_checkpointing",
}  # fmt: skip
"""Fields of config.json that change no embedding; nor do dropout rates and names with an underscore before them."""


class Part(Section):
    path: str
    """A folder in sentence-transformers' format."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Its share, relative to those of the others."""


class MergeRecipe(Section):
    """Which models are merged, in which shares."""

    models: list[Part]
    """Two or more; the first gives everything that is not averaged: modules, pooling, tokenizer, configuration."""
    output: str
    """The folder to write; it must not be there."""
    prompts: dict[str, str] | None = None
    """By role, query and document; those not named here are the first model's."""

    @model_validator(mode="after")
    def _can_be_averaged(self) -> MergeRecipe:
        if len(self.models) < 2:
            raise ValueError("models: a merge takes two or more (add one)")
        if not sum(part.weight for part in self.models):
            raise ValueError("models: every weight is 0 (give one above 0)")
        return self


# --- what can be merged ----------------------------------------------------------------------


class Held(NamedTuple):
    """A tensor in its file."""

    file: Path
    name: str
    dtype: str
    shape: list[int]

    @property
    def averaged(self) -> bool:
        """Not integers, as of positions, nor a pooler, which [CLS] does not need: those are the first model's."""
        return self.dtype.startswith(("F", "BF")) and not self.name.startswith("pooler.")


Tensors = dict[str, Held]
"""By name, with the module's subfolder before it; the files' own names may differ between models."""


def check(folders: Sequence[Path]) -> list[Tensors]:
    """The tensors of each folder, by the headers of its files.

    Raises ModelError, naming what differs, where a folder does not hold the first's architecture and vocabulary.
    """
    first, found = folders[0], [_tensors(folder) for folder in folders]
    facts = [_facts(folder) for folder in folders]
    for folder, held, theirs in zip(folders[1:], found[1:], facts[1:], strict=True):
        for name in sorted(found[0].keys() | held.keys()):
            a, b = found[0].get(name), held.get(name)
            if a and b and (a.shape, a.averaged) != (b.shape, b.averaged):
                what = f"is {b.dtype} {b.shape}, but {a.dtype} {a.shape} in {first}"
                raise ModelError(f"{folder}: {name}: {what} ({_REMEDY})")
            if not (a and b) and (a or b).averaged:  # type: ignore[union-attr]
                missing, there = (folder, first) if a else (first, folder)
                raise ModelError(f"{missing}: {name}: is missing, but in {there} ({_REMEDY})")
        for name in sorted(facts[0].keys() | theirs.keys()):
            if facts[0].get(name) != theirs.get(name):
                values = f"{theirs.get(name)!r}, but {facts[0].get(name)!r} in {first}"
                raise ModelError(f"{folder}: {name}: is {values} ({_REMEDY})")
    return found


_REMEDY = "merge only models that were trained from one model"


def _tensors(folder: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    if not (folder / "modules.json").is_file():
        what = "no modules.json there" if folder.is_dir() else "no such folder"
        raise ModelError(f"{folder}: {what} (name a sentence-transformers folder, as model/ of a run)")
    found: Tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    full = (file.parent.relative_to(folder) / name).as_posix()
                    found[full] = Held(file, name, part.get_dtype(), part.get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
    if not found:
        raise ModelError(f"{folder}: holds no *.safetensors (open it with sentence-transformers and save it once)")
    return found


def _facts(folder: Path) -> dict[str, Any]:
    """What must be equal beside the tensors, each under the name that an error gives it."""
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder).to_dict()
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        places = [module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
        pooling = [Pooling.load_config(str(folder), subfolder=place)["pooling_mode"] for place in places]
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: cannot be opened: {reason}") from None
    matters = {n: v for n, v in config.items() if n not in NO_MATTER and not n.startswith("_") and "dropout" not in n}
    tokens = {f"vocabulary: {token!r}": row for token, row in vocabulary.items()}
    return {**matters, **tokens, "modules": kinds, "pooling": pooling}


# --- merging ---------------------------------------------------------------------------------


def merge(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    output: str | Path,
    *,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """The weighted mean of the models in `folders`, in fp64, as a sentence-transformers folder; whole or absent.

    weights   0 or more, in any unit: each is divided by their sum
    prompts   by role; those that it does not name are the first model's
    Everything else, the tensors' dtypes included, is the first model's. Raises as `check`, and where `output` is there.
    """
    check_absent(output)
    paths = [Path(folder) for folder in folders]
    tensors = check(paths)

    from safetensors.torch import save_file

    from lodestar.files import replacing
    from retrieval.embedding.load_model import load_model

    shares = _shares(weights)
    with replacing(Path(output)) as tmp:
        shutil.copytree(paths[0], tmp, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
        for file in sorted({held.file for held in tensors[0].values()}):
            names = [name for name, held in tensors[0].items() if held.file == file]
            means = {tensors[0][name].name: _mean([each.get(name) for each in tensors], shares) for name in names}
            save_file(means, tmp / file.relative_to(paths[0]), metadata={"format": "pt"})
        _write_prompts(tmp / "config_sentence_transformers.json", prompts or {})
        (tmp / "README.md").write_text(_card(paths, shares), encoding="utf-8")
        load_model(tmp, "cpu")


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / math.fsum(weights) for weight in weights]


def _mean(held: Sequence[Held | None], shares: Sequence[float]) -> Tensor:
    """A tensor of the first model's dtype; the first's own, where such are not averaged."""
    assert held[0] is not None
    first = _read(held[0])
    if not held[0].averaged:
        return first
    total = first.double() * shares[0]
    for each, share in zip(held[1:], shares[1:], strict=True):
        assert each is not None
        total += share * _read(each).double()
    return total.to(first.dtype)


def _read(held: Held) -> Tensor:
    from safetensors import safe_open

    with safe_open(held.file, framework="pt") as opened:
        return opened.get_tensor(held.name)


def _write_prompts(file: Path, prompts: Mapping[str, str]) -> None:
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    said["prompts"] = {"query": "", "document": "", **said.get("prompts", {}), **prompts}
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(paths: Sequence[Path], shares: Sequence[float]) -> str:
    rows = "\n".join(f"| {path} | {share:.4g} |" for path, share in zip(paths, shares, strict=True))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, lodestar, merge]\n---\n\n"
        "# A merged text-embedding model\n\nIts weights are the mean of these models' weights, in these shares:\n\n"
        f"| model | share |\n|---|---:|\n{rows}\n\n"
        "Modules, tokenizer, configuration and, unless others were chosen, prompts are those of the first.\n"
    )


# --- the command -----------------------------------------------------------------------------


def plan(recipe: MergeRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    check_absent(recipe.output)
    folders = [Path(part.path) for part in recipe.models]
    absent = [f"{folder}: no such folder; tensors are not counted" for folder in folders if not folder.is_dir()]
    tensors = [] if absent else list(check(folders)[0].values())
    shares = zip(recipe.models, _shares([part.weight for part in recipe.models]), strict=True)
    return {
        "models": " + ".join(f"{share:.4g} x {part.path}" for part, share in shares),
        "output": recipe.output,
        "averaged_tensors": sum(held.averaged for held in tensors),
        "copied_tensors": sum(not held.averaged for held in tensors),
        "parameters": sum(math.prod(held.shape) for held in tensors),
        "missing": absent,
    }


def run(recipe: MergeRecipe, placement: Placement) -> int:
    alone(placement)
    make_folder(Path(recipe.output).parent, "output")
    weights = [part.weight for part in recipe.models]
    merge([part.path for part in recipe.models], weights, recipe.output, prompts=recipe.prompts)
    print(f"written: {recipe.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Average the weights of trained models.", schema=MergeRecipe, plan=plan, run=run)
