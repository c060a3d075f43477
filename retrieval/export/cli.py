"""The commands that export a model to ONNX and that merge models. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lodestar.cli import entry_point
from lodestar.distributed.runtime import Placement
from lodestar.errors import LaunchError
from lodestar.files import check_absent, make_folder
from lodestar.imports import quick_imports
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.model_folder import check_folder
from retrieval.export.compatibility import check_mergeable, check_tensors, is_averaged
from retrieval.export.config import FP32_FILE, INFO_FILE, INT8_FILE, ExportRecipe, MergeRecipe
from retrieval.export.libraries import require_onnx


def export_main(argv: Sequence[str] | None = None) -> int:
    return entry_point(
        argv,
        usage="Export a trained model to ONNX.",
        schema=ExportRecipe,
        plan=export_plan,
        run=export_run,
    )


def export_plan(recipe: ExportRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    check_absent(recipe.output)
    missing = PlanWarnings()
    missing.or_default(None, lambda: check_folder(recipe.model), "nothing can be exported")
    weights = sum(file.stat().st_size for file in Path(recipe.model).rglob("*.safetensors"))
    files = [FP32_FILE, *([INT8_FILE] if recipe.int8 else []), "tokenizer.json", INFO_FILE]
    return {
        "model": recipe.model,
        "output": recipe.output,
        "files": ", ".join(files),
        "weights_megabytes": round(weights / 1e6),
        "missing": missing.lines,
    }


def export_run(recipe: ExportRecipe, placement: Placement) -> int:
    _prepare_output(recipe.output, placement)
    check_folder(recipe.model)
    require_onnx()
    with quick_imports():
        from retrieval.export.onnx import export_onnx
    for name, file in export_onnx(recipe.model, recipe.output, int8=recipe.int8).items():
        print(
            f"{name}: {file.bytes / 1e6:,.1f} MB; compared with sentence-transformers: largest difference "
            f"{file.largest_difference:.1e}, lowest cosine {file.lowest_cosine:.4f}"
        )
    print(f"written: {recipe.output}")
    return 0


def merge_main(argv: Sequence[str] | None = None) -> int:
    return entry_point(
        argv,
        usage="Average the weights of trained models.",
        schema=MergeRecipe,
        plan=merge_plan,
        run=merge_run,
    )


def merge_plan(recipe: MergeRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    check_absent(recipe.output)
    folders = [Path(model.path) for model in recipe.models]
    missing = [f"{folder}: no such folder; tensors are not counted" for folder in folders if not folder.is_dir()]
    headers = [] if missing else list(check_mergeable(folders)[0].values())
    models = zip(recipe.weights, recipe.models, strict=True)
    return {
        "models": " + ".join(f"{weight:.4g} x {model.path}" for weight, model in models),
        "output": recipe.output,
        "averaged_tensors": sum(is_averaged(header) for header in headers),
        "copied_tensors": sum(not is_averaged(header) for header in headers),
        "parameters": sum(math.prod(header.shape) for header in headers),
        "missing": missing,
    }


def merge_run(recipe: MergeRecipe, placement: Placement) -> int:
    _prepare_output(recipe.output, placement)
    folders = [Path(model.path) for model in recipe.models]
    check_tensors(folders)  # damaged files are told before torch is loaded
    with quick_imports():
        from retrieval.export.merge import merge
    merge(folders, recipe.weights, recipe.output, prompts=recipe.prompts)
    print(f"written: {recipe.output}")
    return 0


def _prepare_output(output: str, placement: Placement) -> None:
    if placement.world_size > 1:
        raise LaunchError("launcher: one process writes the folder (start with python)")
    make_folder(Path(output).parent, "output")
    check_absent(output)
