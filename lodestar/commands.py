"""The `lodestar` command: names to entry points, each loaded when it is called. Loads no library."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn

from lodestar.errors import ConfigError, LodestarError, did_you_mean


class Command(NamedTuple):
    """An entry point, loaded when its command is called."""

    summary: str
    main: str
    """module:function, which takes the arguments after the name and returns the exit code."""
    recipe: str = ""
    """module:class, the schema of its recipe."""


COMMANDS = {
    "pretrain": Command(
        "pre-train an encoder by RetroMAE (stage 1)", "retromae.cli:main", "retromae.config:PretrainRecipe"
    ),
    "finetune": Command(
        "fine-tune an encoder into an embedding model (stage 2)",
        "contrastive.cli:main",
        "contrastive.config:FinetuneRecipe",
    ),
    "mine": Command(
        "add hard negatives to a training file", "retrieval.mining.cli:main", "retrieval.mining.config:MineRecipe"
    ),
    "evaluate": Command(
        "compare models on retrieval, classification, clustering and similarity",
        "retrieval.evaluation.cli:main",
        "retrieval.evaluation.config:EvaluateRecipe",
    ),
    "encode": Command(
        "embed a corpus on all devices", "retrieval.embedding.cli:main", "retrieval.embedding.config:EncodeRecipe"
    ),
    "index": Command(
        "put a corpus into a vector database", "retrieval.search.cli:index_main", "retrieval.search.config:IndexRecipe"
    ),
    "search": Command("ask an index or a corpus", "retrieval.search.cli:search_main"),
    "export": Command(
        "export a model to ONNX", "retrieval.export.cli:export_main", "retrieval.export.config:ExportRecipe"
    ),
    "merge": Command(
        "average the weights of models", "retrieval.export.cli:merge_main", "retrieval.export.config:MergeRecipe"
    ),
    "check": Command("read everything that a recipe names, and list all mistakes", "retrieval.check.cli:main"),
    "recipes": Command("list the recipes that come with lodestar, or print one", "lodestar.recipes_cli:recipes_main"),
    "schema": Command("print the JSON Schema of a command's recipe", "lodestar.recipes_cli:schema_main"),
}


READER_GONE = 141
"""Exit code when what reads the output, as head, has closed the pipe: that of a program that SIGPIPE ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command; returns its exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return READER_GONE


def console() -> NoReturn:
    """The installed `lodestar` command."""
    end(main())


def end(code: int) -> NoReturn:
    """End this process: handlers of atexit run, but Python is not finalised.

    A thread of torch's process groups that drops a tensor during the finalisation aborts the process of a run that is
    done: libraries keep a group, and so its threads, until then.
    """
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        arguments.pop(0)  # deepspeed's launcher passes it first
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"lodestar {version('lodestar-embeddings')}")
    elif name in COMMANDS:
        return load(COMMANDS[name].main)(arguments[1:])  # type: ignore[operator]
    else:
        hint = did_you_mean(name, COMMANDS, "see lodestar --help")
        raise ConfigError(f"command line: {name}: unknown command ({hint})")
    return 0


def load(target: str) -> object:
    """The object at `module:name`."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _usage() -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lodestar COMMAND --config FILE [KEY=VALUE ...]",
            "",
            "Train and use text-embedding models.",
            "",
            *lines,
            "",
            "lodestar COMMAND --help describes a command; lodestar --version prints the version.",
        ]
    )


def recipes_folder() -> Path:
    """`lodestar/recipes` of a wheel, or `configs` of the repository."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"
