"""`make conformance`: the table of docs/numerics.md, printed and written there.

    python -m tests.conformance.table [PYTHON]

PYTHON is that of an environment with FlagEmbedding. Rows that are not measured stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import processes
from tests.conformance.losses import LODESTAR, SENTENCE_TRANSFORMERS
from tests.conformance.problem import HEAD, table_of

PAGE = Path(__file__).parents[2] / "docs/numerics.md"
START, END = "<!-- conformance -->\n", "<!-- /conformance -->"


def main() -> None:
    cells = read() | table_of(LODESTAR | SENTENCE_TRANSFORMERS)
    for python in sys.argv[1:]:
        command = [python, "-m", "tests.conformance.flag_embedding"]
        done = processes.run(command, limit_s=300)
        done.check_returncode()
        cells |= json.loads(done.stdout.splitlines()[-1])  # libraries print lines of their own before
    print(markdown(cells), end="")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}{markdown(cells)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def read() -> dict[str, list[str]]:
    """The cells of the table in docs/numerics.md, by loss."""
    table = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def markdown(cells: dict[str, list[str]]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *((name, *row) for name, row in cells.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
