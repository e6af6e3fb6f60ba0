"""Imports only go down: a module may import from its own floor and those below it, and only the top may import much.

What JAX and Flax do not promise is used in `jaxrnn._compat` alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "jaxrnn"
FLOORS = {
    "_compat": -1,  # imports nothing of jaxrnn
    "_docs": -1,
    "_tables": -1,
    "_weights": -1,
    "rules": -1,
    "meshes": 0,
    "options": 0,
    "layouts": 1,
    "_version": 0,
    "cells": 0,
    "more_cells": 0,
    "spec": 1,
    "packed": 1,
    "steps": 2,
    "engines": 3,
    "blocks": 4,
    "recurrence": 5,
    "stack": 6,
    "calls": 7,
    "flax_cell": 3,
    "flax_sharding": 3,
    "nnx": 8,
    "linen": 8,
    "checkpoint": 9,
    "__main__": 10,
    "__init__": 10,
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


UNPROMISED = ("jax.core", "jax.experimental", "jax.extend", "jax.interpreters", "jax.lib", "flax.core", "sys._getframe")
OWN = ("jaxrnn", "parity")
FILES = [path for folder in (*OWN, "examples") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def _foreign_names(tree: ast.AST) -> Iterator[str]:
    """The dotted names of other packages that are imported, or reached as attributes of what is imported."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                first = alias.name.partition(".")[0]
                imported |= {alias.asname: alias.name} if alias.asname else {first: first}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        place: ast.AST = node
        while isinstance(place, ast.Attribute):
            parts.append(place.attr)
            place = place.value
        if parts and isinstance(place, ast.Name) and place.id in imported:
            yield ".".join([imported[place.id], *reversed(parts)])


def _unpromised(source: str) -> set[str]:
    """What of other packages a source uses that they do not promise."""
    tree, found = ast.parse(source), set()
    for name in _foreign_names(tree):
        own = name.partition(".")[0] in OWN
        private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
        listed = f"{name}.".startswith(tuple(f"{each}." for each in UNPROMISED))
        if not own and (private or listed):
            found.add(name)
    for node in ast.walk(tree):
        text = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.startswith("_pytree__"):
            found.add(text)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_compat_uses_what_others_do_not_promise(path: Path) -> None:
    found = _unpromised(path.read_text())
    if path == PACKAGE / "_compat.py":
        assert found
    else:
        assert not found, "put it in jaxrnn/_compat.py, as a function with the reason, or do without it"


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nisinstance(x, jax.core.Tracer)",
        "import jax.extend",
        "from jax import core",
        "from jax import interpreters as i",
        "def f():\n    from jax._src.core import Tracer",
        "import jax._src.core as c",
        "import jax as j\nj._src",
        "from jax.experimental import topologies",
        "from flax.core.meta import AxisMetadata",
        "import flax\nflax.core.spmd.get_logical_axis_rules()",
        "import orbax.checkpoint as ocp\nocp._src.metadata",
        "import sys\nsys._getframe(1)",
        "from sys import _getframe as frame",
        "node._pytree__state",
        "name.startswith('_pytree__')",
    ],
)
def test_what_is_not_promised_is_seen(source: str) -> None:
    assert _unpromised(source)


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.__version__",
        "from __future__ import annotations",
        "from jaxrnn import _compat",
        "from . import sides\nsides._call",
        "from parity import sides\nsides._call",
        "self._core",
    ],
)
def test_what_may_be_used(source: str) -> None:
    assert not _unpromised(source)
