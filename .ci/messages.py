"""List every error and warning that users can meet: `python .ci/messages.py`, to read them all in one go.

Each line has the place, the type and the message, with what is filled in between braces.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _words(node: ast.expr) -> str:
    """The message as written: strings joined, f-strings with their braces, and other expressions as code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.IfExp):
        return f"[{_words(node.body)} | {_words(node.orelse)}]"
    return "{" + ast.unparse(node) + "}"


def messages(path: Path) -> Iterator[tuple[int, str, str]]:
    """Each `raise`, `warnings.warn` and `parser.error` of a file: its line, what is raised, and the words."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield node.lineno, _name(node.exc.func), _words(node.exc.args[0])
        elif isinstance(node, ast.Call) and node.args and _name(node.func) in ("warn", "error"):
            kind = _name(node.args[1]) if len(node.args) > 1 else "usage" if _name(node.func) == "error" else "UserWarning"
            yield node.lineno, kind, _words(node.args[0])


def main() -> int:
    count = 0
    for folder in ("jaxrnn", "parity"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, kind, words in sorted(messages(path)):
                print(f"{path.relative_to(ROOT)}:{line} {kind}: {words}")
                count += 1
    print(f"{count} messages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
