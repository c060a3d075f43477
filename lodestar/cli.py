"""What all commands share: options, strict recipes, plans, and one line for each error. Loads without torch."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from lodestar.config import loader
from lodestar.config.explain import located
from lodestar.config.tree import COMMAND_LINE, Tree
from lodestar.distributed.runtime import Placement, quiet_libraries
from lodestar.errors import ConfigError, LodestarError, PeerLostError, did_you_mean, shown
from lodestar.planning.cost_model import DEVICES
from lodestar.planning.plan import in_words

AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)


def entry_point(
    argv: Sequence[str] | None,
    *,
    usage: str,
    schema: type[AnyRecipe],
    plan: Callable[[AnyRecipe, int, str | None], dict[str, Any]],
    run: Callable[[AnyRecipe, Placement], int],
    rehearse: Callable[[AnyRecipe, Placement, int], int] | None = None,
) -> int:
    """Parse the options, load the recipe, then plan, run or rehearse; returns the exit code, 2 after a user's error.

    usage      the text of --help
    plan       (recipe, world size, device) -> the plan, ready for JSON
    rehearse   (recipe, placement, steps) -> exit code; none for a command without a dry run
    """
    rank, tree = 0, Tree()
    try:
        placement = Placement.from_env()
        rank = placement.rank
        quiet_libraries()
        options = _parse(argv, usage)
        tree = loader.read(options.config, options.overrides)
        recipe = loader.validate(schema, tree)
        if options.plan is None:
            placement = replace(placement, located=partial(located, schema, tree))
            placement.prepare()
        if options.plan is None and options.rehearse is not None:
            if rehearse is None:
                raise ConfigError(f"{COMMAND_LINE}: --rehearse: only training has a dry run (leave it out)")
            return rehearse(recipe, placement, options.rehearse)
        if options.plan is None:
            return run(recipe, placement)
        values = plan(recipe, options.plan or placement.world_size, options.device)
        if rank == 0:
            print(json.dumps(values) if options.json else in_words(values))
            if not options.json:
                print(f"{'to check all files':<22} lodestar check --config {options.config}")
        return 0
    except LodestarError as error:
        if rank == 0 if error.print_on_this_rank is None else error.print_on_this_rank:
            print(f"error: {located(schema, tree, str(error))}", file=sys.stderr, flush=True)
        elif not isinstance(error, PeerLostError):
            time.sleep(5)  # launchers end all ranks when one exits: let rank 0 print first
        return error.exit_code


def _parse(argv: Sequence[str] | None, usage: str) -> argparse.Namespace:
    parser = Parser(usage)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys, as optim.lr=1e-5")
    parser.add_argument(
        "--plan",
        nargs="?",
        type=_world_size,
        const=0,
        metavar="WORLD_SIZE",
        help="print what the run would do, and exit",
    )
    parser.add_argument(
        "--device", choices=sorted(DEVICES), help="plan for such devices: whether the run fits, how long it takes"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--rehearse",
        type=_steps,
        metavar="STEPS",
        help="dry run: take real steps on generated text, print what they cost, and exit",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # deepspeed's launcher passes it; ignored
    options = parser.parse_intermixed_args(argv)
    if options.plan is None and (lone := "--json" if options.json else "--device" if options.device else None):
        raise ConfigError(f"{COMMAND_LINE}: {lone}: only with --plan (add that, or leave it out)")
    return options


def _steps(text: str) -> int:
    return _whole_number(text, "steps", range(3, 10**6 + 1))


def _world_size(text: str) -> int:
    return _whole_number(text, "processes", range(1, 10**5 + 1))


def _whole_number(text: str, what: str, allowed: range) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) in allowed):
        limits = f"from {allowed[0]:,} to {allowed[-1]:,}"
        raise argparse.ArgumentTypeError(f"must be a number of {what}, got {shown(text)} (take one {limits})")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for wrong options, so that they are printed as one line like any other error."""

    def __init__(self, usage: str) -> None:
        prog = "lodestar" if Path(sys.argv[0]).name == "__main__.py" else None
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=usage, formatter_class=formatter, allow_abbrev=False)

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse's; an option or key given twice is a mistake, unless the option collects its values."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        known = {name: action for action in self._actions for name in action.option_strings}
        given = [known[name] for word in options if (name := word.partition("=")[0]) in known]
        for action in given:
            repeats = isinstance(action, argparse._AppendAction) or action.help == argparse.SUPPRESS
            if given.count(action) > 1 and not repeats:
                raise ConfigError(f"{COMMAND_LINE}: {action.option_strings[0]}: given twice (keep one of the two)")
        options = super().parse_intermixed_args(words, namespace)
        keys = [override.partition("=")[0] for override in getattr(options, "overrides", ())]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise ConfigError(f"{COMMAND_LINE}: {twice}: given twice (keep one of the two)")
        return options

    def error(self, message: str) -> NoReturn:
        """argparse's messages in our form: the option first, and what to do."""
        message = message.removeprefix("argument ")
        option, _, problem = message.partition(": ")
        if problem.startswith("expected"):
            message = f"{option}: has no value (give one)"
        elif problem.startswith("ignored explicit argument"):
            message = f"{option}: takes no value (leave it out)"
        elif choices := re.search(r"invalid choice: (.*) \(choose from (.*)\)", problem):
            message = f"{option}: must be one of {choices[2]}, got {choices[1]} (correct it)"
        elif value := re.search(r"invalid int value: (.*)", problem):
            message = f"{option}: must be an integer, got {shown(value[1])} (correct it)"
        elif option == "the following arguments are required":
            message = f"{problem}: not given (see --help)"
        elif option == "unrecognized arguments":
            names = [name for action in self._actions for name in action.option_strings]
            first = problem.split()[0]
            message = f"{first}: unknown option ({did_you_mean(first.partition('=')[0], names, 'see --help')})"
        elif not message.endswith(")"):
            message = f"{message} (see --help)"
        raise ConfigError(f"{COMMAND_LINE}: {message}")
