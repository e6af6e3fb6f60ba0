"""List every error and warning that users can meet: `python .ci/messages.py`, to read them all in one go.

Each line has the place, the type and the message, with what is filled in between braces.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


# Words that an exception's message may be built from: names of variables and constants, and what each may hold.
Known = dict[str, list[ast.expr]]


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _words(node: ast.expr, known: Known) -> str:
    """The message as written: strings joined, variables that hold text filled in, other expressions in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _words(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left, known) + _words(node.right, known)
    if isinstance(node, ast.IfExp):
        return f"[{_words(node.body, known)} | {_words(node.orelse, known)}]"
    if isinstance(node, ast.Name) and (texts := [text for text in known.get(node.id, ()) if _is_text(text)]):
        others = {name: values for name, values in known.items() if name != node.id}
        found = list(dict.fromkeys(_words(text, others) for text in texts))
        return found[0] if len(found) == 1 else f"[{' | '.join(found)}]"
    return "{" + ast.unparse(node) + "}"


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _assigned(tree: ast.AST) -> Known:
    """What each name is assigned, also several at once."""
    found: Known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append(value)
    return found


def _constants(path: Path) -> Known:
    module = ast.Module([node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)], [])
    return {name: values for name, values in _assigned(module).items() if name.strip("_").isupper()}


def _lines_of_text(node: ast.AST) -> Iterator[ast.expr]:
    """Texts that are part of a message made elsewhere: `yield f"..."`, and what is added to a list of problems."""
    if isinstance(node, ast.Yield) and node.value and _is_text(node.value):
        yield node.value
    elif isinstance(node, ast.AugAssign) and _name(node.target) in ("problems", "words"):
        yield from (each for each in ast.walk(node.value) if isinstance(each, ast.JoinedStr))
    elif isinstance(node, ast.Call) and _name(node.func) == "append" and node.args and _is_text(node.args[0]):
        yield node.args[0]


def messages(path: Path, constants: Known) -> Iterator[tuple[int, str, str]]:
    """Each `raise`, `warnings.warn` and `parser.error` of a file: its line, what is raised, and the words."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    known: dict[int, Known] = {}
    for function in functions:
        names = constants | _assigned(function)
        known |= {id(node): names for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = known.get(id(node), constants)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield node.lineno, _name(node.exc.func), _words(node.exc.args[0], names)
        elif isinstance(node, ast.Call) and node.args and (call := _name(node.func)) in ("warn", "error"):
            kinds = [each for each in node.args[1:] if _name(each).endswith("Warning")]
            kind = _name(kinds[0]) if kinds else "usage" if call == "error" else "UserWarning"
            texts = [each for each in node.args if _is_text(each)] or node.args[-1:]
            yield node.lineno, kind, _words(texts[0], names)
        for text in _lines_of_text(node):
            yield node.lineno, "part", _words(text, names)


def all_messages() -> Iterator[tuple[str, str, str]]:
    """Every message of the package and of the parity suite: its place, what is raised, and the words."""
    paths = [path for folder in ("jaxrnn", "parity") for path in sorted((ROOT / folder).rglob("*.py"))]
    own = {path: _constants(path) for path in paths}
    imported = {name: value for constants in own.values() for name, value in constants.items()}
    for path in paths:
        for line, kind, words in sorted(messages(path, imported | own[path])):
            yield f"{path.relative_to(ROOT)}:{line}", kind, words


def main() -> int:
    found = list(all_messages())
    for place, kind, words in found:
        print(f"{place} {kind}: {words}")
    print(f"{len(found)} messages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
