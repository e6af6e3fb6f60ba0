"""Make a README's links absolute. A package index shows the README alone, where relative links lead nowhere.

    python .ci/package_page.py https://github.com/OWNER/jaxrnn README.md > page.md

Build from a copy of the tree with this page in place of README.md.
"""

import re
import sys
from pathlib import Path

PICTURES = (".svg", ".png")


def absolute(text: str, repository: str) -> str:
    """A page whose relative links are absolute: pictures as raw files, everything else as pages."""

    def link(found: re.Match[str]) -> str:
        target = found[1]
        if target.startswith("https://"):
            return found[0]
        if target.startswith("#"):  # a package index gives headings no anchors
            return f"]({repository.rstrip('/')}{target})"
        kind = "raw" if target.endswith(PICTURES) else "blob"
        return f"]({repository.rstrip('/')}/{kind}/main/{target})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


if __name__ == "__main__":
    print(absolute(Path(sys.argv[2]).read_text(), sys.argv[1]), end="")
