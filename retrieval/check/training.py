"""The check of a training recipe: data, model, tokenizer, evaluation, output, disk space, devices.

Loads without torch.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from lodestar.config.schema import ModelConfig, TrainingDataConfig, TrainingRecipe
from lodestar.data.readers import Source, find_sources
from lodestar.data.training_examples import content_hash
from lodestar.errors import ConfigError, LodestarError, naming, shown
from lodestar.models.folder_checks import check_model, read_prompts
from lodestar.models.pooling_config import encoder_file
from lodestar.planning.plan import Plan
from retrieval.check.inspection import Inspection, Texts, inspect
from retrieval.evaluation.beir import Beir, read_beir

Value = TypeVar("Value")


class TrainingTexts(NamedTuple):
    """What a stage's recipe trains on."""

    paths: Sequence[str]
    texts: Texts
    max_lengths: Mapping[str, int]
    """By role, in tokens."""
    plan: Callable[[Any, int, None], Plan]
    """(recipe, world size, device) -> the plan."""


@dataclass
class CheckReport:
    """All findings, and statistics by name."""

    errors: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    facts: dict[str, object] = field(default_factory=dict[str, object])
    lengths: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """For the figure: by role."""
    unit: str = "tokens"

    def attempt(self, find: Callable[[], Value]) -> Value | None:
        """What `find` returns; none, and its error noted, where it raises."""
        try:
            return find()
        except LodestarError as error:
            self.errors += str(error).split("\nerror: ")
            return None


def check_training(
    recipe: TrainingRecipe, data: TrainingDataConfig, training: TrainingTexts, world_size: int
) -> CheckReport:
    """Read everything that the recipe names."""
    report = CheckReport()
    report.attempt(partial(check_model, recipe.model, finite=True))
    evaluates_nothing = recipe.evaluate.model_copy(update={"data": None})  # its files are read whole below
    planned = recipe.model_copy(update={"evaluate": evaluates_nothing})
    plan = report.attempt(partial(training.plan, planned, world_size, None))
    for line in plan["missing"] if plan else []:
        problem, _, _ = line.rpartition("; ")  # what a plan assumes instead is of no interest here
        if problem.endswith(")") and not problem.startswith("data.") and problem not in report.errors:
            report.warnings.append(f"warning: {problem}")
    add_prompts(recipe.model.encoder, report)
    tokenizer = _find_tokenizer(recipe.model, report)
    _check_run_folder(recipe, plan, report)
    beir = _read_evaluation(recipe, report)
    sources: list[Source] = []
    for path in training.paths:
        sources += report.attempt(partial(find_sources, [path])) or []
    inspection = inspect([s for s in sources if s.kind != "hub"], training.texts, tokenizer, data.processes)
    inspection.findings.add_repeated(sources)
    _add_statistics(inspection, training.max_lengths, tokenizer is not None, report)
    if beir is not None:
        _add_leakage(inspection, beir, report)
    if data.strict:
        report.errors += [line.removeprefix("warning: ") for line in inspection.findings.warnings]
    else:
        report.warnings += inspection.findings.warnings
    return report


def add_prompts(model: str, report: CheckReport) -> None:
    """The prompts in a model's folder, as a fact."""
    if Path(model).is_dir():
        with suppress(LodestarError):  # told by the check of the folder
            prompts = {role: prompt for role, prompt in read_prompts(Path(model)).items() if prompt}
            report.facts["prompts"] = (
                ", ".join(f"{role}: {shown(prompt)}" for role, prompt in prompts.items()) or "none"
            )


def _find_tokenizer(model: ModelConfig, report: CheckReport) -> Path | None:
    """The tokenizer.json, if there is one that opens."""
    name = model.tokenizer or model.encoder
    path = encoder_file(name, "tokenizer.json")
    if path is None:
        report.warnings.append(f"warning: model.tokenizer: {name}: no tokenizer.json (lengths are in characters)")
        return None
    try:
        report.facts["vocabulary"] = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception:  # the library raises Exception itself
        if not Path(name).is_dir():  # else told by the check of the folder
            report.errors.append(f"model.tokenizer: {path}: is no tokenizer that tokenizers can read (fetch it again)")
        return None
    return path


def check_output(
    output: str | Path, field: str, report: CheckReport, needed_bytes: int = 0, remedy: str = "make room"
) -> bool:
    """Whether a folder can be written to, and its disk holds what will be written."""
    folder = Path(output).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        report.errors.append(f"{field}: {folder}: {existing} cannot be written to (name another folder)")
        return False
    report.facts["free_bytes"] = free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        problem = f"{free / 2**30:.1f} GiB are free, {needed_bytes / 2**30:.1f} are needed"
        report.errors.append(f"{field}: {folder}: {problem} ({remedy}, or name another disk)")
    return True


def _check_run_folder(recipe: TrainingRecipe, plan: Plan | None, report: CheckReport) -> None:
    folder = Path(recipe.run.output_dir).absolute()
    needed = (recipe.checkpoint.keep + 1) * plan["checkpoint_bytes"] if plan else 0
    if check_output(folder, "run.output_dir", report, needed, "make room, lower checkpoint.keep") and plan:
        report.facts |= {"output": f"{folder}, {plan['state']}", "checkpoints_bytes": needed}
    report.facts["gpus"] = len(glob.glob("/dev/nvidia[0-9]*"))


def _read_evaluation(recipe: TrainingRecipe, report: CheckReport) -> Beir | None:
    section = recipe.evaluate
    if section.data is None:
        return None
    limits = {"max_queries": section.max_queries, "max_documents": section.max_documents}
    with_field = naming("evaluate.data")(partial(read_beir, section.data, section.split, **limits))
    beir = report.attempt(with_field)
    if beir is not None:
        report.facts |= {"evaluation_queries": len(beir.queries), "evaluation_documents": len(beir.documents)}
    return beir


def _add_statistics(
    inspection: Inspection, max_lengths: Mapping[str, int], in_tokens: bool, report: CheckReport
) -> None:
    report.errors += inspection.errors
    if hidden := inspection.num_errors - len(inspection.errors):
        report.errors.append(f"data.train: {hidden:,} more mistakes in the same files (mend those above first)")
    report.facts |= {"rows": inspection.rows, "dropped": inspection.dropped, "mistakes": inspection.num_errors}
    report.lengths, report.unit = inspection.lengths, "tokens" if in_tokens else "characters"
    for role, lengths_N in inspection.lengths.items():
        half, most, longest = np.percentile(lengths_N, [50, 95, 100]).astype(int).tolist()
        report.facts[f"{role}_texts"] = len(lengths_N)
        report.facts[f"{role}_{report.unit}"] = f"median {half:,}, 95 % up to {most:,}, longest {longest:,}"
        if in_tokens:
            report.facts[f"{role}_truncated"] = float(np.mean(lengths_N > max_lengths[role]))
        hashes_N = inspection.hashes[role]
        report.facts[f"{role}_duplicates"] = len(hashes_N) - len(np.unique(hashes_N))
    if not inspection.rows and not report.errors:
        report.errors.append(str(ConfigError("data.train: no row that can be checked (name files with texts)")))


def _add_leakage(inspection: Inspection, beir: Beir, report: CheckReport) -> None:
    """Evaluation texts that are training texts too; for documents that is usual, for queries it is not."""
    trained_N = np.concatenate([*inspection.hashes.values(), np.empty(0, np.int64)])
    for name, texts in (("queries", beir.queries), ("documents", beir.documents)):
        hashes_M = np.array([content_hash(text) for text in texts], dtype=np.int64)
        report.facts[f"evaluation_{name}_in_training"] = int(np.isin(hashes_M, trained_N).sum())
    if leaked := report.facts["evaluation_queries_in_training"]:
        report.warnings.append(
            f"warning: evaluate.data: {beir.name}: {leaked:,} of its queries are training texts too "
            "(take them out of the training data)"
        )
