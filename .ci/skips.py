"""Say which tests no run of CI ran, and why; fail where a page names one of them.

python .ci/skips.py README.md docs/*.md FIRST.xml [SECOND.xml ...]

The .xml files are those of `pytest --junitxml`. Exit status: 0; 1 if a test that a page names did not run in any.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def outcomes(reports: list[Path]) -> dict[tuple[str, str], str | None]:
    """(module, name) of each test -> why every run that had it skipped it, or None where one did not."""
    tests: dict[tuple[str, str], str | None] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            test = case.get("classname") or case.get("name"), case.get("name")  # a whole file is skipped by its name
            skipped = case.find("skipped")
            if skipped is None:
                tests[test] = None
            elif tests.get(test, "") is not None:
                tests[test] = skipped.get("message") or "no reason given"
    return tests


def main(argv: list[str]) -> int:
    pages, reports = ([Path(name) for name in argv if name.endswith(suffix)] for suffix in (".md", ".xml"))
    tests = outcomes(reports)
    reasons = {test: reason for test, reason in tests.items() if reason is not None}
    print(f"{len(tests) - len(reasons)} tests ran, {len(reasons)} did not:")
    for reason, count in Counter(reasons.values()).most_common():
        print(f"  {count} x {reason}")

    # Of a function every case has to run; of a file that a page names, something.
    promised = {name: page for page in pages for name in re.findall(r"(?<![\w-])test_\w+", page.read_text())}
    functions = {test: test[1].partition("[")[0] for test in tests}
    ran = {functions[test] for test in tests.keys() - reasons.keys()}
    ran |= {file for test in tests.keys() - reasons.keys() for file in re.findall(r"\btest_\w+", test[0])}
    broken = sorted(promised.keys() & {functions[test] for test in reasons} | promised.keys() - ran)
    for name in broken:
        print(f"{promised[name]} names {name}, which did not run.", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
