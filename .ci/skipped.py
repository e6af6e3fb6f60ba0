"""Fail if a test was skipped, for want of a library, wherever it ran: `python .ci/skipped.py RESULTS.xml...`."""

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

WANT = re.compile(r"is not installed|could not import")


def results(path: Path) -> Iterator[tuple[str, str, str]]:
    """Each test's module and name, and why it was skipped for want of a library; empty if it ran."""
    for case in ET.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        reason = "" if skipped is None else skipped.get("message", "") + (skipped.text or "")
        module, name = case.get("classname", ""), case.get("name", "")
        if not module:  # a whole module was skipped
            module, name = name, ""
        if skipped is None or WANT.search(reason):
            yield module, name, reason


def main(paths: list[Path]) -> int:
    ran, skipped = set(), {}
    for path in paths:
        for module, name, reason in results(path):
            if reason:
                skipped[module, name] = reason
            else:
                ran |= {(module, name), (module, "")}
    nowhere = sorted(skipped.keys() - ran)
    for test in nowhere:
        print("::".join(test), skipped[test])
    return int(bool(nowhere))


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
