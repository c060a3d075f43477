"""The trainer: a run from its recipe to the exported model, for both stages."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import torch
from safetensors import SafetensorError

from lodestar.config import loader
from lodestar.config.schema import AUTO, NEUTRAL
from lodestar.data.loader import lost_workers_told
from lodestar.distributed.collectives import agreed, from_main, on_main
from lodestar.distributed.launcher import lasting_output
from lodestar.distributed.runtime import Placement, Runtime, local_environment
from lodestar.distributed.session import distributed_session
from lodestar.errors import CheckpointError, ConfigError, DataError, TrainingError, did_you_mean, first_line
from lodestar.files import NO_SUCH_FILE, locked, make_folder, read_object, replacing, restore, write_json, write_text
from lodestar.planning.plan import batch_in_words, in_words
from lodestar.reporting.throughput import Console, Throughput
from lodestar.reporting.trackers import Tracker
from lodestar.reporting.training_report import write_report
from lodestar.training import checkpoint
from lodestar.training.auto_batch_size import out_of_memory_told, with_measured_micro_tokens
from lodestar.training.build_engine import build
from lodestar.training.checkpoint_hook import CheckpointHook
from lodestar.training.crash_loop import CrashLoopHook
from lodestar.training.engine import Engine, ResumeState
from lodestar.training.environment import environment
from lodestar.training.hooks import Clock, EvaluateHook, LogHook, StopHook, counts_of
from lodestar.training.loop import Hook, Progress, fit
from lodestar.training.schedule import lr_factor
from lodestar.training.task import BuildTask, Recipe, TaskSpec, TrainingTask

_KEY_OF = {
    "seed": "run.seed", "global_size": "batch.global_size", "data": "data.train", "samples": "data.train",
    "pooling": "model.pooling",
}  # fmt: skip
"""The recipe's keys for values of TrainingTask.identity."""
STOPPED = 3
"""Exit code of a run that a signal stopped; the same command resumes it."""


def train(recipe: Recipe, placement: Placement, spec: TaskSpec[Recipe]) -> int:
    """Train to the end, or until a signal; returns the exit code."""
    minutes = recipe.engine.timeout_minutes
    folder = Path(recipe.run.output_dir)
    with (
        lasting_output(),
        StopHook(placement.world_size) as stop,
        distributed_session(placement, minutes, recipe, folder / "stacks") as runtime,
        ExitStack() as locks,
    ):
        stop.ranks_have_met()
        on_main(lambda: _lock(folder, locks))
        if recipe.batch.micro_tokens == AUTO:
            recipe = with_measured_micro_tokens(recipe, runtime, spec)
        plan = on_main(lambda: spec.plan(recipe, runtime.world_size, None))
        if runtime.is_main:
            print(batch_in_words(plan), file=sys.stderr, flush=True)
        with out_of_memory_told(recipe, runtime), lost_workers_told(runtime.rank):
            return Trainer(recipe, runtime, in_words(plan)).run(spec.build_task, stop)


def _lock(folder: Path, locks: ExitStack) -> None:
    """Create the run folder, and lock it for this run."""
    make_folder(folder, "run.output_dir")
    locks.enter_context(locked(folder, "run.output_dir"))


class Trainer(Generic[Recipe]):
    """One run in its folder: from a checkpoint, or from the start, to the exported model."""

    def __init__(self, recipe: Recipe, runtime: Runtime, plan: str = "") -> None:
        self.recipe, self.runtime, self.plan = recipe, runtime, plan
        self.folder = Path(recipe.run.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.hashed: checkpoint.Hashed = {}
        """On rank 0."""
        self.clock = Clock()
        self.changes: list[dict[str, Any]] = []
        """Of the recipe, at earlier resumes of this run."""

    def run(self, build_task: BuildTask[Recipe], stop: StopHook) -> int:
        """Returns the exit code: 0, or STOPPED."""
        recipe, runtime = self.recipe, self.runtime
        on_main(lambda: make_folder(self.folder, "run.output_dir"))
        on_main(self._check_allowed)
        with agreed():
            task = build_task(recipe, runtime)
        progress = Progress(task.total_steps)
        with agreed():
            if not task.total_steps:
                raise DataError(
                    f"schedule.epochs: {recipe.schedule.epochs} x {task.rows} examples do not fill one batch of "
                    f"{recipe.batch.global_size} (lower batch.global_size, or raise schedule.epochs)"
                )
            resumed = self._find_checkpoint(task, progress)
        crashes = CrashLoopHook(self.folder, [loader.flat(recipe), runtime.world_size]) if runtime.is_main else None
        with agreed():
            if crashes is not None:
                crashes.check(task.total_steps, task.examples_at)
        if progress.done and self._is_finished(progress):
            self._print(
                f"{self.folder}: all {progress.total_steps} steps are done; the model is in {self.folder / 'model'}"
            )
            return 0
        engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
        if resumed is not None:
            with agreed():
                engine.resume(resumed)
            self._print(f"resumes from step {progress.step} of {progress.total_steps}")
        on_main(lambda: self._open_folder(task, progress))
        with crashes or nullcontext():
            self._train(task, engine, progress, stop, crashes)
        if progress.stop is not None:
            self._print(f"stopped by {progress.stop} at step {progress.step}; the same command resumes from here")
        return STOPPED if progress.stop is not None else 0

    def _train(
        self, task: TrainingTask, engine: Engine, progress: Progress, stop: StopHook, crashes: CrashLoopHook | None
    ) -> None:
        recipe, main = self.recipe, self.runtime.is_main
        with agreed():
            tracker = self._tracker(progress)
        console = Console(total=progress.total_steps, initial=progress.step, enabled=main)
        warmup = recipe.schedule.warmup_steps(progress.total_steps)
        shape, floor = recipe.schedule.shape, recipe.schedule.floor
        with (
            ThreadPoolExecutor(1, "checkpoint") as writer,  # left when nothing is in flight any more
            closing(tracker),
            closing(task.batches(progress.step)) as batches,
        ):
            hooks: list[Hook] = [  # in this order: a stop writes its checkpoint after logging and evaluation
                self._log_hook(task, tracker, console),
                *([self._evaluate_hook(task, engine, tracker, console)] if task.evaluate is not None else []),
                stop,
                self._checkpoint_hook(task, engine, stop, writer),
                *([crashes] if crashes is not None else []),
            ]
            fit(
                task.stage,
                engine,
                batches,
                progress=progress,
                lr_factor_at=lambda step: lr_factor(
                    step, total=progress.total_steps, warmup=warmup, floor=floor, shape=shape
                ),
                hooks=hooks,
                counters=task.counters,
            )
            if progress.stop is None:
                self._finish(task, engine, progress)
        counts = counts_of(progress)
        on_main(lambda: self._summarise(progress, {**counts, **task.data_counts}))

    # --- before training ---

    def _open_folder(self, task: TrainingTask, progress: Progress) -> None:
        """Archive or delete what an earlier run wrote after the step at which this run starts, and write the recipe."""
        with self._writing():
            self._update_folder(task, progress)

    def _update_folder(self, task: TrainingTask, progress: Progress) -> None:
        make_folder(self.checkpoints, "run.output_dir")
        restore(self.folder / "model")
        for name in checkpoint.archive(self.checkpoints, progress.step):
            self._print(
                f"warning: {self.checkpoints}: {name}: archived, because this run starts at step {progress.step}"
            )
        if not progress.step or ((best := self._best()) and best["step"] > progress.step):
            (self.folder / "best.json").unlink(missing_ok=True)
        if self._earlier:
            # The run is no longer stopped: so it says also if it is killed.
            write_json(self.folder / "summary.json", {**self._earlier, "stopped_by": None})
        write_text(self.folder / "config.yaml", loader.dump(self.recipe))
        data = task.identity.get("data")
        values = environment(self.runtime, self.recipe.run.output_dir)
        write_json(self.folder / "environment.json", {**values, "data": data, "changes": self.changes})

    def _find_checkpoint(self, task: TrainingTask, progress: Progress) -> ResumeState | None:
        """Load the weights and the progress of the checkpoint to resume from, if any."""
        folder, warnings = on_main(
            lambda: checkpoint.find(self.checkpoints, self.recipe.checkpoint.resume, self.hashed)
        )
        for line in warnings:
            self._print(f"warning: {line}")
        if folder is None:
            return None
        tensors, values = checkpoint.read(folder, self.hashed)
        self._check_changes(folder, values, task.identity)
        progress.step, progress.skipped = values["step"], values.get("skipped", 0)
        progress.counters = {name: values.get(name, 0) if self.runtime.is_main else 0 for name in task.counters}
        if progress.step > progress.total_steps:
            raise CheckpointError(
                f"schedule: {progress.total_steps} steps, but {folder} has taken {progress.step} (raise them, or "
                "choose another run.output_dir)"
            )
        weights, optimizer = (checkpoint.with_new_names(tensors[n], task.new_names) for n in ("weights", "optimizer"))
        with torch.no_grad():
            for name, parameter in task.module.named_parameters():
                if name not in weights or weights[name].shape != parameter.shape:
                    raise CheckpointError(f"{folder}: {name}: missing or of another shape: it belongs to another model")
                parameter.copy_(weights[name])
        updates = progress.step - int(progress.skipped)
        return ResumeState(weights, optimizer, updates, values.get("engine", {}))

    def _check_allowed(self) -> None:
        """ConfigError where checkpoint.allow_change names no key of the recipe."""
        known = [*loader.flat(self.recipe), "data.train"]
        sections = {key.rpartition(".")[0] for key in known}
        for name in self.recipe.checkpoint.allow_change:
            if name not in sections and not loader.covers(known, name):
                hint = did_you_mean(name, known, "name a key, as optim.lr")
                raise ConfigError(f"checkpoint.allow_change: {name}: no key of this recipe ({hint})")

    def _check_changes(self, folder: Path, values: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """CheckpointError where the checkpoint's recipe computes something else, if not in checkpoint.allow_change."""
        values = {"pooling": "cls", **values}  # earlier versions had no other pooling
        saved_recipe = values.get("recipe")  # earlier versions saved it in the run folder only
        if saved_recipe is None and (earlier := folder.parent.parent / "config.yaml").is_file():
            saved_recipe = loader.flat(loader.read_values(earlier))
        compared: list[tuple[str, Any, Any]] = [
            (_KEY_OF.get(name, name), values[name], now) for name, now in identity.items() if name in values
        ]
        recipe = loader.flat(self.recipe, without=[*NEUTRAL, *_KEY_OF.values()])
        compared += [
            (key, saved_recipe[key], now) for key, now in recipe.items() if saved_recipe and key in saved_recipe
        ]
        changed = [(key, before, now) for key, before, now in compared if before != now]
        allowed = self.recipe.checkpoint.allow_change
        refused = [(key, before, now) for key, before, now in changed if not loader.covers(allowed, key)]
        if refused:
            differences = "; ".join(
                f"{key}: the checkpoint has {before!r}, this run {now!r}" for key, before, now in refused
            )
            names = ", ".join(key for key, _, _ in refused)
            raise CheckpointError(
                f"{folder}: {differences} (restore it, allow it by checkpoint.allow_change='[{names}]', choose another "
                "run.output_dir, or set checkpoint.resume=none)"
            )
        self.changes = list(values.get("changes", []))
        for key, before, now in changed:
            self._print(f"{key}: {now!r} from step {values['step']} on, {before!r} before")
            self.changes.append({"step": values["step"], "key": key, "before": before, "now": now})

    def _is_finished(self, progress: Progress) -> bool:
        return on_main(lambda: bool(self._earlier.get("finished")) and (self.folder / "model").is_dir())

    @cached_property
    def _earlier(self) -> dict[str, Any]:
        """The summary of an earlier run in this folder; empty where there is none, or a damaged one. On rank 0."""
        path = self.folder / "summary.json"
        try:
            values = read_object(path)
            is_damaged = not all(isinstance(values.get(name, 0), int | float) for name in ("steps", "seconds"))
        except ValueError as error:
            values, is_damaged = dict[str, Any](), str(error) != NO_SUCH_FILE
        if not is_damaged:
            return values
        self._print(f"warning: {path}: damaged: not a run's summary (nothing to do: it is written again at the end)")
        return {}

    def _best(self) -> dict[str, Any] | None:
        """The best evaluation so far, whose model is the exported one; none before the first. On rank 0."""
        path = self.folder / "best.json"
        try:
            best = read_object(path)
            if type(best["step"]) is int and isinstance(best["metric"], str) and isinstance(best["value"], int | float):
                return best
        except (ValueError, KeyError) as error:
            if str(error) == NO_SUCH_FILE:
                return None
        raise CheckpointError(
            f"evaluate.keep_best: {path}: damaged: not the record of the best model (restore it, or delete it: then "
            "the next evaluation is the best so far)"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """TrainingError where the run folder cannot be written to."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise TrainingError(
                f"run.output_dir: {getattr(error, 'filename', None) or self.folder}: cannot be written: {reason} (make "
                "room there, or mend its permissions; the same command resumes)"
            ) from None

    def _tracker(self, progress: Progress) -> Tracker:
        if not self.runtime.is_main:
            return Tracker.silent()
        recipe = self.recipe
        tracker = Tracker.open(self.folder, recipe.track, recipe.run.name, recipe, local_environment())
        with self._writing():
            tracker.resume_at(progress.step)
        return tracker

    def _log_hook(self, task: TrainingTask, tracker: Tracker, console: Console) -> LogHook:
        return LogHook(
            tracker,
            console,
            Throughput(),
            every=self.recipe.track.log_every,
            peak_lrs=self.recipe.optim.peak_lrs,
            rows_per_epoch=task.rows or 0,
            rows_per_step=self.recipe.batch.global_size,
            max_consecutive_nonfinite_steps=self.recipe.engine.give_up_after,
        )

    def _evaluate_hook(self, task: TrainingTask, engine: Engine, tracker: Tracker, console: Console) -> EvaluateHook:
        def evaluate(step: int) -> dict[str, Any]:
            assert task.evaluate is not None
            engine.module.eval()
            metrics = task.evaluate()
            engine.module.train()
            if task.keep_best is not None:
                self._export_if_best(task, engine, step, metrics)
            return metrics

        section = self.recipe.evaluate
        return EvaluateHook(evaluate, tracker, console, every=section.every_steps, at_start=section.at_start)

    def _checkpoint_hook(
        self, task: TrainingTask, engine: Engine, stop: StopHook, writer: ThreadPoolExecutor
    ) -> CheckpointHook:
        recipe = self.recipe
        return CheckpointHook(
            engine,
            self.checkpoints,
            recipe.checkpoint,
            {**task.identity, "recipe": loader.flat(recipe), "changes": self.changes},
            writer=writer,
            hashed=self.hashed,
            is_main=self.runtime.is_main,
            request_stop=stop.request,
            timeout_minutes=recipe.engine.timeout_minutes,
        )

    # --- after training ---

    def _export_if_best(self, task: TrainingTask, engine: Engine, step: int, metrics: Mapping[str, Any]) -> None:
        metric = task.keep_best or ""
        if metric not in metrics:
            known = ", ".join(name for name in metrics if name != "evaluation")
            raise DataError(f"evaluate.keep_best: {metric}: not a metric (one of {known})")
        best = on_main(self._best)
        if best is None or best["metric"] != metric or metrics[metric] > best["value"] or best["step"] == step:
            self._export(task, engine, {"steps": step, **metrics})
            record = {"metric": metric, "value": metrics[metric], "step": step}
            on_main(lambda: self._write_json("best.json", record))

    def _finish(self, task: TrainingTask, engine: Engine, progress: Progress) -> None:
        if task.keep_best is None or not from_main((self.folder / "best.json").is_file()):
            self._export(task, engine, {"steps": progress.step, **progress.final})

    def _export(self, task: TrainingTask, engine: Engine, results: Mapping[str, Any]) -> None:
        weights = engine.weights()

        def write() -> None:
            with self._writing(), replacing(self.folder / "model") as tmp:
                task.export(weights, tmp, {**task.data_counts, **results})

        on_main(write)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        with self._writing():
            write_json(self.folder / name, values)

    def _summarise(self, progress: Progress, counts: Mapping[str, int]) -> None:
        earlier = self._earlier
        has_advanced = earlier.get("steps", 0) < progress.step
        self._write_json(
            "summary.json",
            {
                "finished": progress.done and progress.stop is None,
                "stopped_by": progress.stop,
                "steps": progress.step,
                "total_steps": progress.total_steps,
                **counts,
                "seconds": (earlier.get("seconds", 0.0) if has_advanced else 0.0) + self.clock.seconds(),
                "final": progress.final,
            },
        )
        with self._writing():
            write_report(self.folder, plan=self.plan)
        words = {"skipped": "skipped steps", "masked": "masked false negatives", "without_tokens": "without a token"}
        self._print("counts: " + ", ".join(f"{count:,} {words.get(name, name)}" for name, count in counts.items()))

    def _print(self, line: str) -> None:
        if self.runtime.is_main:
            print(line, file=sys.stderr, flush=True)
