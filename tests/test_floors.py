"""Imports only go down: a module may import from its own floor and those below it, and only the top may import much."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxrnn"
FLOORS = {
    "_version": 0,
    "cells": 0,
    "spec": 1,
    "packed": 1,
    "pointwise": 1,
    "recurrence": 2,
    "stack": 3,
    "flax_cell": 3,
    "flax_sharding": 3,
    "nnx": 4,
    "linen": 4,
    "checkpoint": 5,
    "__main__": 6,
    "__init__": 6,
}


def _floor(path: Path) -> int:
    return FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def _imports(source: str) -> list[str]:
    """The jaxrnn modules a source imports, wherever in the file it does so."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] in ("jaxrnn", "parity")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    for name in _imports(path.read_text()):
        package, module = name.split(".")[:2]
        assert package == "jaxrnn", f"{path.name} imports {name}, which is not in the wheel"
        assert FLOORS[module] <= _floor(path), f"{path.name} imports {name} from a floor above its own"


def test_an_import_upward_is_seen() -> None:
    assert _imports("def f():\n    from jaxrnn.nnx import LSTM") == ["jaxrnn.nnx.LSTM"]
    assert FLOORS["nnx"] > FLOORS["stack"]
