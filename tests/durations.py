"""The table of slow tests in CONTRIBUTING.md, from a run of them:

make test-slow PYTEST_OPTIONS=--junitxml=build/slow.xml
python -m tests.durations build/slow.xml
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def table(report: Path) -> str:
    """Markdown, from a JUnit report: seconds with setup, and the number of cases, of each test; longest first."""
    seconds: Counter[tuple[str, str]] = Counter()
    cases: Counter[tuple[str, str]] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].replace(".", "/") + ".py", case.attrib["name"].partition("[")[0]
        seconds[name] += float(case.attrib["time"])
        cases[name] += 1
    rows = [f"| {file} | {test} | {cases[file, test]} | {total:.0f} |" for (file, test), total in seconds.most_common()]
    return "\n".join(["| file | test | cases | seconds |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
