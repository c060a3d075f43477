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
    """Markdown, from a JUnit report: the number of slow tests of each file, and their seconds with setup."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            file = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[file] += float(case.attrib["time"])
            tests[file] += 1
    rows = [f"| `{file}` | {tests[file]} | {seconds[file]:.0f} |" for file in sorted(tests)]
    return "\n".join(["| file | slow tests | seconds |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
